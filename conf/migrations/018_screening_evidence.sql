-- Why orders have their reasons, where rules look across products: several tasks then find reasons for one order, and an alert has
-- the evidence of all. Only where there are such rules is anything noted here, and for three days: by then no order is remembered.
create table screening_evidence (
    order_id text primary key,
    evidence jsonb not null,  -- reason → its evidence, as the text that an alert has
    noted_at timestamptz not null default clock_timestamp()
);

do $$
begin
    grant select, insert, update, delete on screening_evidence to finpro_screen;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_screen may not use screening_evidence yet: once there is this role (006_roles.sql), '
        'grant select, insert, update, delete on screening_evidence to finpro_screen';
end
$$;
