-- Group roles, one for each kind of work, with the privileges that it needs and no more: `grant finpro_screen to …` a login.
-- May be run again at any time: by an administrator, when the user that migrates may not create roles.
do $$
declare
    group_role text;
begin
    foreach group_role in array
        array['finpro_generate', 'finpro_produce', 'finpro_screen', 'finpro_export', 'finpro_reconcile', 'finpro_monitor']
    loop
        begin
            if not exists (select from pg_roles where rolname = group_role) then
                execute format('create role %I nologin', group_role);
            end if;
        exception when duplicate_object or unique_violation then
            null;  -- roles belong to the whole server: another database of it is being migrated as well
        end;
    end loop;

    grant select, insert, update on raw_users, raw_products to finpro_generate;
    grant select on raw_users, raw_products to finpro_produce;
    grant select, insert, update on raw_orders to finpro_screen;
    grant select on raw_users, raw_products, raw_orders to finpro_export;
    grant select, insert, update on ingestion_monitoring to finpro_reconcile;
    grant select on raw_orders, ingestion_monitoring to finpro_monitor;
    -- Rows are copied to a temporary table first.
    execute format('grant temporary on database %I to finpro_generate, finpro_screen', current_database());
exception when insufficient_privilege then
    raise warning 'The roles finpro_generate, finpro_produce, finpro_screen, finpro_export, finpro_reconcile and '
        'finpro_monitor are not made: % may not create roles. Where commands are to log in as users of their own, have an '
        'administrator run conf/migrations/006_roles.sql.', current_user;
end
$$;
