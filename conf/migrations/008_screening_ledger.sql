-- What screening has planned and settled: a row a micro-batch, written before any of its orders is.
-- A task stores only while the row of its micro-batch is open, and of its driver's epoch; so whoever comes late stores nothing.
create table screening_ledger (
    query_id      text not null,  -- of the checkpoint
    number        bigint not null,  -- of the micro-batch, as Spark counts
    epoch         bigint not null,  -- of the driver that planned it, or does it again
    moment        timestamptz not null,  -- its own time, the same when it is done again
    rules_version text not null,
    topic_id      text not null,  -- that Kafka gave the topic
    first_offsets jsonb not null,  -- partition -> the first offset
    end_offsets   jsonb not null,  -- partition -> the offset after the last
    planned_at    timestamptz not null default clock_timestamp(),
    settled_at    timestamptz,
    states        integer,  -- how many rows of screening_state it has written
    counts        jsonb,  -- what came of it
    primary key (query_id, number)
);

-- Which driver has a query: the one of the newest epoch, as long as it gives signs of life.
create table screening_drivers (
    query_id   text primary key,
    epoch      bigint not null,
    host       text not null,
    machine    text not null,  -- tells its kernel from others: there one can see whether the process lives
    process    integer not null,
    since      timestamptz not null,
    seen_at    timestamptz not null,
    checkpoint text not null
);

-- A checkpoint from before there was a ledger goes on: its newest micro-batch gets a row, which the next start completes.
-- (A row of bucket -1 said only that there was a micro-batch.) And micro-batches have parts now, 1,024 at most.
insert into screening_ledger (query_id, number, epoch, moment, rules_version, topic_id, first_offsets, end_offsets, settled_at)
select query_id, max(batch), 0, '-infinity', '', '', '{}', '{}', now() from screening_state group by query_id;
delete from screening_state where bucket < 0;
update screening_state set batch = -batch * 1024 - 1;  -- in two steps, as a number may be another one's already
update screening_state set batch = -batch - 1;

do $$
begin
    grant select, insert, update, delete on screening_ledger, screening_drivers to finpro_screen;
    grant select on screening_ledger to finpro_monitor;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_screen and finpro_monitor may not use screening_ledger and screening_drivers yet: once there are these '
        'roles (006_roles.sql), grant select, insert, update, delete on screening_ledger, screening_drivers to finpro_screen; '
        'grant select on screening_ledger to finpro_monitor';
end
$$;
