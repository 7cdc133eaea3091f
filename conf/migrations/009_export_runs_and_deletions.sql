-- What each export leaves in the database that it has read, before its manifest counts. The next one looks for it: a database
-- that lacks it was restored to an earlier moment, moved, or failed over with a loss.
create table export_runs (
    number      bigint primary key,  -- of the run: greater than that of each run before it
    follows     bigint not null unique,  -- the number before it: of two exports at once one comes to nothing
    run_id      text not null,
    token       uuid not null,  -- random: the manifest has the same
    oldest_xid  xid8 not null,  -- the oldest transaction that was open at the run's snapshot
    exported_at timestamptz not null default now()
);

-- What is no longer where it was: a row that was deleted, or an order that got another key or another day. Exports carry it.
create table deleted_rows (
    table_name text not null,
    key        text,  -- null: the table was truncated
    day        date,  -- UTC day of the row's created_date
    change_xid xid8 not null default pg_current_xact_id(),
    deleted_at timestamptz not null default now()
);
create index deleted_rows_change_xid on deleted_rows (change_xid);

-- With its owner's rights: who may delete a row need not be able to write down what they like. The argument is the key's name.
create function note_deletion() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        execute format('insert into %I.deleted_rows (table_name) values ($1)', tg_table_schema) using tg_table_name;
    else
        execute format('insert into %I.deleted_rows (table_name, key, day) values ($1, $2, $3)', tg_table_schema)
        using tg_table_name, to_jsonb(old) ->> tg_argv[0], (old.created_date at time zone 'UTC')::date;
    end if;
    return null;
end
$$;
revoke execute on function note_deletion() from public;

-- Whoever updates other columns, as screening does, does not pay for these triggers.
create trigger note_deletion after delete on raw_users for each row execute function note_deletion('user_id');
create trigger note_deletion after delete on raw_products for each row execute function note_deletion('product_id');
create trigger note_deletion after delete on raw_orders for each row execute function note_deletion('order_id');
create trigger note_move after update of user_id on raw_users
    for each row when (new.user_id <> old.user_id) execute function note_deletion('user_id');
create trigger note_move after update of product_id on raw_products
    for each row when (new.product_id <> old.product_id) execute function note_deletion('product_id');
create trigger note_move after update of order_id, created_date on raw_orders
    for each row when (
        new.order_id <> old.order_id
        or (new.created_date at time zone 'UTC')::date <> (old.created_date at time zone 'UTC')::date
    ) execute function note_deletion('order_id');
create trigger note_truncation after truncate on raw_users for each statement execute function note_deletion();
create trigger note_truncation after truncate on raw_products for each statement execute function note_deletion();
create trigger note_truncation after truncate on raw_orders for each statement execute function note_deletion();

do $$
begin
    grant select, insert on export_runs to finpro_export;
    grant select, delete on deleted_rows to finpro_export;
    grant select on export_runs, deleted_rows to finpro_reconcile;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_export may not use export_runs and deleted_rows yet: once there are these roles (006_roles.sql), '
        'grant select, insert on export_runs to finpro_export; grant select, delete on deleted_rows to finpro_export; '
        'grant select on export_runs, deleted_rows to finpro_reconcile';
end
$$;
