-- Once per database, as a superuser, connected to it: the roles, and who may make tables.
-- Passwords, certificates or pg_hba.conf are yours: `\password singletrack_owner`, `\password singletrack_service`.

do $$
begin
    -- Roles are the server's: another database of it may have made them.
    if to_regrole('singletrack_owner') is null then create role singletrack_owner login; end if;
    if to_regrole('singletrack_service') is null then create role singletrack_service login; end if;
    if to_regrole('singletrack_reader') is null then create role singletrack_reader nologin; end if;
end $$;

-- The owner migrates; nobody else makes or changes tables.
revoke create on schema public from public;
grant usage, create on schema public to singletrack_owner;
grant usage on schema public to singletrack_service, singletrack_reader;

-- Without it the service does not see which sessions of others keep old rows in the way.
grant pg_read_all_stats to singletrack_service;
