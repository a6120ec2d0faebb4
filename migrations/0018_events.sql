-- By itself: while the index is built, which takes some seconds per ten million runs, nobody can write to run_events; but nothing that
-- renews a lease does.
--
-- Events in an order in which none comes later before one that was read: a number of `seq` may become visible after a larger one, but no
-- transaction below events_horizon() can still write here. The order takes the place of the primary key, which nobody
-- reads by: each event has as many index entries as before.
create unique index run_events_in_order on run_events (xid, seq);
alter table run_events
    drop constraint run_events_pkey,
    add constraint run_events_pkey primary key using index run_events_in_order;

-- Retention deletes by run, and so not in that order: what was deleted last of it says who may have missed something.
create table events_forgotten (
    one boolean not null default true,
    xid xid8    not null,
    seq bigint  not null,

    constraint events_forgotten_pkey primary key (one),
    constraint events_forgotten_one check (one)
);
comment on table events_forgotten is 'One row: the last event, in the order of (xid, seq), that retention has deleted.';
comment on column events_forgotten.one is 'Always true: there is one row.';
comment on column events_forgotten.xid is 'Its transaction. Whoever has read only up to one before it may have missed events.';
comment on column events_forgotten.seq is 'Its number.';
insert into events_forgotten (xid, seq) values (pg_snapshot_xmin(pg_current_snapshot()), 0);

-- pg_snapshot_xmin would do, but that it knows no databases: a transaction that is open in any other one of the server would hold events
-- back. A transaction is left out only where its lock on itself, which all can see, is of a backend in another database; one that has
-- no lock yet, or none any more, or is prepared, counts.
create function events_horizon() returns xid8 language sql stable set search_path from current as $$
    select coalesce(
        (select x.xid
         from pg_snapshot_xip(pg_current_snapshot()) as x (xid)
         where not exists (
             select
             from pg_locks l
             join pg_stat_activity a on a.pid = l.pid
             where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and l.transactionid = x.xid::xid
               and a.datname <> current_database())
         order by x.xid
         limit 1),
        pg_snapshot_xmax(pg_current_snapshot()))
$$;
comment on function events_horizon() is 'The oldest transaction that may still write events here: those of older ones are all to be seen.';
