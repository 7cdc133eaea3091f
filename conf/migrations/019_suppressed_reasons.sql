-- What a list has kept from being a reason (`allows` in the rules file). A reason that an order was given is none that was suppressed.
alter table raw_orders
    add column suppressed_reasons text[] not null default '{}',
    add check (cardinality(suppressed_reasons) = 0 or not suppressed_reasons && reasons);
