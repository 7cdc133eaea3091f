-- The three raw tables. Every row carries the transaction that last wrote it (change_xid), so that an
-- incremental export can ask for "what changed since" without missing transactions that commit late.

create table raw_users (
    user_id      bigint primary key check (user_id >= 1),
    name         text not null,
    email        text not null unique,
    phone_number text not null,
    created_date timestamptz not null,
    source       text not null,
    ingested_at  timestamptz not null default now(),
    change_xid   xid8 not null default pg_current_xact_id()
);

create table raw_products (
    product_id   bigint primary key check (product_id >= 1),
    product_name text not null unique,
    category     text not null,
    sub_category text not null,
    currency     text not null,
    price        bigint not null check (price > 0),
    cost         bigint not null check (cost >= 0 and cost < price),
    created_date timestamptz not null,
    source       text not null,
    ingested_at  timestamptz not null default now(),
    change_xid   xid8 not null default pg_current_xact_id()
);

-- No foreign keys: an order for an unknown user or product is kept and screened; the warehouse tests report it.
create table raw_orders (
    order_id       text primary key,
    user_id        bigint not null,
    product_id     bigint not null,
    quantity       bigint not null,
    amount         text not null,
    amount_numeric bigint not null,
    country        text not null,
    created_date   timestamptz not null,
    event_ts       timestamptz not null,
    status         text not null check (status in ('Genuine', 'Fraud')),
    source         text not null,
    reasons        text[] not null,
    rules_version  text not null,
    screened_at    timestamptz not null,
    ingested_at    timestamptz not null default now(),
    change_xid     xid8 not null default pg_current_xact_id(),
    check ((status = 'Fraud') = (cardinality(reasons) > 0))
);
