-- What each reconciliation of an export run found: one row a table, the newest finding stands. A profile is what
-- batch/warehouse/profile.py computes: sums, least and greatest values, a fingerprint of the texts.
create table ingestion_monitoring (
    run_id              text not null,
    dag_id              text not null,
    table_name          text not null,
    source_rows         bigint not null,
    destination_rows    bigint not null,
    source_profile      jsonb not null,
    destination_profile jsonb not null,
    status              text not null check (status in ('Consistent', 'Inconsistent')),
    started_at          timestamptz not null,
    finished_at         timestamptz not null,
    primary key (run_id, table_name)
);
