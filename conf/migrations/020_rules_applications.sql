-- Rules that were applied to orders of before (`finpro rules apply`), and how far. As of rules_proposals, rows are only added.
create table rules_applications (
    number     bigint primary key check (number >= 1),
    version    text not null,         -- of the rules, as the lakehouse's history has them
    since      timestamptz not null,  -- event time
    until      timestamptz,           -- not included; null: up to the last order
    days       date[] not null,       -- the UTC days of event time on which there was something to add
    figures    json not null,         -- what was to be added, by reason
    applied_at timestamptz not null,  -- the time that all of its verdicts carry
    applied_by text not null,
    why        text not null
);

-- Days that are done, and how many orders were given further reasons: an application that was interrupted goes on with the others.
create table rules_application_days (
    application bigint references rules_applications,
    day         date,
    orders      bigint not null,
    done_at     timestamptz not null default clock_timestamp(),
    primary key (application, day)
);

create trigger is_a_record before update or delete or truncate on rules_applications
    for each statement execute function refuse_changes();
create trigger is_a_record before update or delete or truncate on rules_application_days
    for each statement execute function refuse_changes();

do $$
begin
    grant select, insert on rules_applications, rules_application_days to finpro_rules;
    grant select on rules_applications, rules_application_days to finpro_screen;  -- for the audit
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_rules may not apply rules to orders of before yet: once there are this role and finpro_screen, '
        'grant select, insert on rules_applications, rules_application_days to finpro_rules; '
        'grant select on rules_applications, rules_application_days to finpro_screen';
end
$$;
