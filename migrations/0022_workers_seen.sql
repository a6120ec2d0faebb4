-- Who waits for a slot is told whether a worker is there that could start the holder: a look at those who were here within the last minute.
-- Without an index it is a scan, which sessions of the service give a price so high that other choices in the same statement drown in it.
-- A worker says so once in 15 seconds at most: that each time makes new entries in both indexes of this small table is little beside that.
create index workers_seen on workers (seen_at);
comment on index workers_seen is 'The workers that asked for runs of late.';
