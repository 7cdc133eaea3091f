-- What turned out about orders: statements of people and of systems, each of which stays. The newest by decided_at counts, of two of
-- one moment the one that was taken later. A correction is one more statement.
create table order_outcomes (
    outcome_id  bigint generated always as identity primary key,
    order_id    text not null,  -- also of an order that is not there, or not yet
    outcome     text not null check (outcome in ('fraud', 'genuine')),
    reviewed_by text not null,
    reason      text,  -- in words: may name a person, so it is neither exported nor archived
    decided_at  timestamptz not null,
    source      text not null check (source in ('file', 'topic')),
    ingested_at timestamptz not null default now(),
    change_xid  xid8 not null default pg_current_xact_id(),
    unique (order_id, decided_at, outcome, reviewed_by)  -- the same statement, which is not taken twice
);
-- As of raw_orders: what an export asks for, and the days of statements.
create index order_outcomes_change_xid on order_outcomes (change_xid);
create index order_outcomes_decided_at on order_outcomes
    using brin (decided_at timestamptz_minmax_multi_ops (values_per_range = 128)) with (autosummarize = on);
create statistics order_outcomes_day on ((decided_at at time zone 'UTC')::date) from order_outcomes;
create trigger stamp_change_xid before update on order_outcomes
    for each row when (new.change_xid = old.change_xid) execute function stamp_change_xid();

-- One writer at a time, so that numbers are in the order of commits: who has read up to a number has read all before it.
create function take_turns_with_outcomes() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock(x'6f7574636f6d65'::bigint);
    return null;
end
$$;
create trigger take_turns before insert on order_outcomes for each statement execute function take_turns_with_outcomes();

create function keep_outcomes() returns trigger language plpgsql as $$
begin
    raise exception 'order_outcomes: a statement stays as it was made; a correction is one more statement'
        using errcode = 'restrict_violation';
end
$$;
-- Its words and who said so may be erased.
create trigger keep_statements before update on order_outcomes for each row
    when ((old.outcome_id, old.order_id, old.outcome, old.decided_at, old.source)
        is distinct from (new.outcome_id, new.order_id, new.outcome, new.decided_at, new.source))
    execute function keep_outcomes();
create trigger keep_rows before delete on order_outcomes for each row execute function keep_outcomes();
create trigger keep_table before truncate on order_outcomes for each statement execute function keep_outcomes();

-- How far the topic order_outcomes was taken; written with what was taken.
create table outcome_offsets (
    topic       text not null,
    partition   int not null,
    topic_id    text not null,  -- Kafka's: another one once the topic was made anew
    next_offset bigint not null,
    primary key (topic, partition)
);

-- Messages of it that are no statements, and why. The bytes are erased when somebody is forgotten: they may name them.
create table outcome_dead_letters (
    topic_id    text not null,
    partition   int not null,
    "offset"    bigint not null,
    received_at timestamptz not null,
    value       bytea,
    reason      text not null,
    primary key (topic_id, partition, "offset")
);

do $$
begin
    begin
        if not exists (select from pg_roles where rolname = 'finpro_outcomes') then
            create role finpro_outcomes nologin;
        end if;
    exception when duplicate_object or unique_violation then
        null;  -- another database of this server is being migrated as well
    end;
    grant select, insert on order_outcomes, outcome_dead_letters to finpro_outcomes;
    grant select, insert, update on outcome_offsets to finpro_outcomes;
    grant select on raw_orders to finpro_outcomes;
    execute format('grant temporary on database %I to finpro_outcomes', current_database());
    grant select on order_outcomes to finpro_export, finpro_reconcile;
exception when undefined_object or insufficient_privilege then
    raise warning 'There is no role finpro_outcomes, and finpro_export and finpro_reconcile may not read order_outcomes yet. Have an '
        'administrator run: create role finpro_outcomes; grant select, insert on order_outcomes, outcome_dead_letters to finpro_outcomes; '
        'grant select, insert, update on outcome_offsets to finpro_outcomes; '
        'grant select on raw_orders to finpro_outcomes; grant select on order_outcomes to finpro_export, finpro_reconcile';
end
$$;
