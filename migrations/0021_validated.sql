-- By itself: readers and writers go on meanwhile.
alter table test_runs validate constraint test_runs_sound;
