-- What screening remembers between micro-batches: of each bucket of products its recent orders, and how far it has come.
-- A row says what a micro-batch made of a bucket; Spark's checkpoint says which micro-batch was the last.
create table screening_state (
    query_id text not null,  -- of the checkpoint
    division text not null,  -- how products are divided: partition/4, product/2
    bucket   integer not null,  -- -1 where a task of the micro-batch had no orders to read
    batch    bigint not null,
    state    bytea not null,  -- what is remembered in which rows of this bucket
    orders   bytea not null,  -- what this micro-batch added to it, compressed; empty where that is nothing
    primary key (query_id, division, bucket, batch)
);
alter table screening_state alter column orders set storage external;  -- it is compressed already
-- A few hundred rows that come and go several times a second.
alter table screening_state set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, fillfactor = 50);

do $$
begin
    grant select, insert, update, delete on screening_state to finpro_screen;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_screen may not use screening_state yet: once there is this role (006_roles.sql), '
        'grant select, insert, update, delete on screening_state to finpro_screen';
end
$$;
