-- An incremental export asks each raw table for the rows that a transaction from some id on wrote.
create index raw_users_change_xid on raw_users (change_xid);
create index raw_products_change_xid on raw_products (change_xid);
create index raw_orders_change_xid on raw_orders (change_xid);

-- An UPDATE that says nothing of change_xid, such as a correction by hand, is a change as well. finpro's own statements
-- set it, and do not pay for the trigger.
create function stamp_change_xid() returns trigger language plpgsql as $$
begin
    new.change_xid := pg_current_xact_id();
    return new;
end
$$;

create trigger stamp_change_xid before update on raw_users
    for each row when (new.change_xid = old.change_xid) execute function stamp_change_xid();
create trigger stamp_change_xid before update on raw_products
    for each row when (new.change_xid = old.change_xid) execute function stamp_change_xid();
create trigger stamp_change_xid before update on raw_orders
    for each row when (new.change_xid = old.change_xid) execute function stamp_change_xid();
