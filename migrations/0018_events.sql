-- By itself: while the index is built, which takes some seconds per ten million runs, nobody can write to run_events; but nothing that
-- renews a lease does.
--
-- Events in an order in which none comes later before one that was read: a number of `seq` may become visible after a larger one, but no
-- transaction below pg_snapshot_xmin(pg_current_snapshot()) can still write. The order takes the place of the primary key, which nobody
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
