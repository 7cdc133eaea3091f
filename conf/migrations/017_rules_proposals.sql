-- Rules that were proposed, and rules that were put in force: `finpro rules propose`, `promote` and `revert` add a row each. Nothing
-- here is ever changed or deleted. `content` is a rules file and what it needs beside it, {"text": …, "beside": {name: text}}.
create table rules_proposals (
    number      bigint generated always as identity primary key,
    version     text not null,
    fingerprint text not null,    -- SHA-256 of the content
    content     json not null,
    replaces    text not null,    -- fingerprint of the rules file in force then
    follows     bigint not null,  -- number of the newest promotion then, 0 where there was none
    figures     json not null,    -- what was found, and the limits that were given
    failed      text[] not null,  -- the limits that it does not keep, in words
    proposed_at timestamptz not null default now(),
    proposed_by text not null
);
create index rules_proposals_fingerprint on rules_proposals (fingerprint);

create table rules_promotions (
    number      bigint primary key check (number >= 1),  -- of the one before, and 1: of two at once one finds it taken
    proposal    bigint references rules_proposals,  -- null: it goes back to what was in force before
    version     text not null,
    fingerprint text not null,
    content     json not null,
    replaced    json,             -- the content that was in force until then; null where no file was there
    promoted_at timestamptz not null default clock_timestamp(),
    promoted_by text not null,
    why         text not null,
    despite     text              -- why it is in force although it does not keep a limit
);

create function refuse_changes() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    raise exception '% is a record: rows are added to it, and nothing else', tg_table_name;
end
$$;
create trigger is_a_record before update or delete or truncate on rules_proposals
    for each statement execute function refuse_changes();
create trigger is_a_record before update or delete or truncate on rules_promotions
    for each statement execute function refuse_changes();

do $$
begin
    begin
        if not exists (select from pg_roles where rolname = 'finpro_rules') then
            create role finpro_rules nologin;
        end if;
    exception when duplicate_object or unique_violation then
        null;  -- roles belong to the whole server: another database of it is being migrated as well
    end;
    grant select, insert on rules_proposals, rules_promotions to finpro_rules;
exception when insufficient_privilege then
    raise warning 'The role finpro_rules is not made: % may not create roles. Where who promotes rules is to log in as a user of their '
        'own, have an administrator create it and grant select, insert on rules_proposals, rules_promotions to finpro_rules', current_user;
end
$$;
