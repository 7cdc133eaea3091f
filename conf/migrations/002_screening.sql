-- Where screening's workers copy a micro-batch's verdicts before one statement merges them into raw_orders. Unlogged:
-- what is lost here is replayed from the checkpoint. `tag` names the task attempt that wrote a row; only the rows of
-- attempts that succeeded are merged.
create unlogged table staging_orders (
    tag            text not null,
    revision       boolean not null,
    order_id       text not null,
    user_id        bigint not null,
    product_id     bigint not null,
    quantity       bigint not null,
    amount         text not null,
    amount_numeric bigint not null,
    country        text not null,
    created_date   timestamptz not null,
    event_ts       timestamptz not null,
    source         text not null,
    reasons        text not null,
    "partition"    integer not null,
    "offset"       bigint not null,
    received_at    timestamptz not null
) with (autovacuum_enabled = false);

-- Messages that use an order_id which another order already has: decided once, so that every replay sets the same
-- ones aside. Each is a dead letter.
create table order_conflicts (
    topic       text not null,
    "partition" integer not null,
    "offset"    bigint not null,
    order_id    text not null,
    found_at    timestamptz not null default now(),
    primary key (topic, "partition", "offset")
);
