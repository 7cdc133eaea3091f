-- What rules in shadow mode find: kept beside the reasons, without any bearing on the status.
alter table raw_orders add column shadow_reasons text[] not null default '{}';
