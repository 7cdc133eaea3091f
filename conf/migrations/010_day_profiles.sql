-- What the newest export found in each UTC day of raw_orders: of the days that do not change nothing is read again.
create table day_profiles (
    table_name text not null,
    day        date not null,
    rows       bigint not null,
    profile    jsonb not null,  -- as batch/warehouse/profile.py computes it
    primary key (table_name, day)
);

-- Finds the orders of a day, and costs whoever writes next to nothing. With many intervals a range of blocks: an order of long
-- ago that was revised lies among those of today, and with one interval would make the range one of all days between.
create index raw_orders_created_date on raw_orders
    using brin (created_date timestamptz_minmax_multi_ops (values_per_range = 128)) with (autosummarize = on);

-- How many days there are: without it Postgres takes each order for a day of its own, and profiles all days by one process.
create statistics raw_orders_day on ((created_date at time zone 'UTC')::date) from raw_orders;
analyze raw_orders;

do $$
begin
    grant select, insert, update, delete on day_profiles to finpro_export;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_export may not use day_profiles yet: once there is this role (006_roles.sql), '
        'grant select, insert, update, delete on day_profiles to finpro_export';
end
$$;
