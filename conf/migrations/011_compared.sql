-- Whether a reconciliation compared a whole table, or the days that its run had changed.
alter table ingestion_monitoring
    add column compared text not null default 'whole' check (compared in ('whole', 'changed days'));

-- The whole is compared with raw_orders as it is by then.
do $$
begin
    grant select on raw_orders to finpro_reconcile;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_reconcile may not read raw_orders yet, as `finpro reconcile --whole` does: once there is this role '
        '(006_roles.sql), grant select on raw_orders to finpro_reconcile';
end
$$;
