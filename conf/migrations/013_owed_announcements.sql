-- A query whose checkpoint is given up may have stored orders that it did not announce. The query that reads them again, with a
-- checkpoint of its own, announces what was stored since then, until it has read as far: {"since": time, "ends": {partition: offset}}.
alter table screening_ledger add column owed jsonb;

-- Which queries there are: the newest row of each is found by its key, and the ledger of a month has millions.
do $$
begin
    grant select on screening_drivers to finpro_monitor;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_monitor may not read screening_drivers yet: once there is this role (006_roles.sql), '
        'grant select on screening_drivers to finpro_monitor';
end
$$;
