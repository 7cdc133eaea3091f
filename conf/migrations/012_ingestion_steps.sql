-- What BigQuery has read for each step of a run, in bytes: all tries of the step together. `bytes_billed` is what Google charges for.
create table ingestion_steps (
    run_id          text not null,
    step            text not null,  -- load, reconcile, validate, transform
    jobs            integer not null,
    bytes_processed bigint not null,
    bytes_billed    bigint not null,
    finished_at     timestamptz not null,  -- of the last try
    primary key (run_id, step)
);

do $$
begin
    grant select, insert, update on ingestion_steps to finpro_reconcile;
    grant select on ingestion_steps to finpro_monitor;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_reconcile and finpro_monitor may not use ingestion_steps yet: once there are these roles (006_roles.sql), '
        'grant select, insert, update on ingestion_steps to finpro_reconcile; grant select on ingestion_steps to finpro_monitor';
end
$$;
