-- Who waits for a slot is told whether a worker is there that could start the holder: a look at those who were here within the last minute.
-- Without an index it is a scan, which sessions of the service give a price so high that other choices in the same statement drown in it.
create index workers_seen on workers (seen_at);
comment on index workers_seen is 'The workers that asked for runs of late.';
