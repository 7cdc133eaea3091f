-- The fields that the rules declared when an order was read, as far as it had them: a JSON object by name; null where it had none.
alter table raw_orders add column attributes jsonb;
