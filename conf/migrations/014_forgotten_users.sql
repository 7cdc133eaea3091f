-- Who is forgotten: `finpro forget` adds a row a person. From then on raw_users holds a pseudonym in the place of what it held of
-- them, whoever writes there, and however late. The number stays: orders, verdicts and sums go by it.
create table forgotten_users (
    user_id      bigint primary key check (user_id >= 1),
    request      text,  -- what asked for it: the number of a ticket, for instance
    forgotten_at timestamptz not null default now(),
    completed_at timestamptz  -- when it was done everywhere; null as long as some place could not be reached
);

-- After each statement that brings users, or somebody to forget; `arrived` are its rows. batch/forgotten.py has the same pseudonyms.
-- With its owner's rights: who may add users need not be able to read or change all of them.
create function keep_forgotten() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from arrived) then  -- it changes raw_users itself, and so comes here again
        execute format(
            $statement$
            update %1$I.raw_users as stored
            set name = pseudonym, email = pseudonym || '@forgotten.invalid', phone_number = pseudonym,
                ingested_at = default, change_xid = default
            from (
                select user_id, 'forgotten-' || user_id as pseudonym
                from %1$I.forgotten_users where user_id in (select user_id from arrived)
            ) as forgotten
            where stored.user_id = forgotten.user_id
              and (stored.name, stored.email, stored.phone_number)
                  is distinct from (pseudonym, pseudonym || '@forgotten.invalid', pseudonym)
            $statement$,
            tg_table_schema
        );
    end if;
    return null;
end
$$;
revoke execute on function keep_forgotten() from public;

create trigger keep_forgotten after insert on forgotten_users
    referencing new table as arrived for each statement execute function keep_forgotten();
create trigger keep_forgotten_of_new after insert on raw_users
    referencing new table as arrived for each statement execute function keep_forgotten();
create trigger keep_forgotten_of_changed after update on raw_users
    referencing new table as arrived for each statement execute function keep_forgotten();

do $$
begin
    grant select on forgotten_users to finpro_generate, finpro_export;
exception when undefined_object or insufficient_privilege then
    raise warning 'finpro_generate and finpro_export may not read forgotten_users yet: once there are these roles (006_roles.sql), '
        'grant select on forgotten_users to finpro_generate, finpro_export';
end
$$;
