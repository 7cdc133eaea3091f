-- A query whose checkpoint is given up may have stored orders that it did not announce. The query that reads them again, with a
-- checkpoint of its own, announces what was stored since then, until it has read as far: {"since": time, "ends": {partition: offset}}.
alter table screening_ledger add column owed jsonb;
