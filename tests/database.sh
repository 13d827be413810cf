# shellcheck shell=bash
# To be sourced, with $wbctl, $name and $work set: a volume over the loop device, with PostgreSQL on
# it and clients that check each commit.
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
chmod 755 "$work"
export WB_CONFIG_DIR=$work/config WB_RUN_DIR=$work/run WB_STATE_DIR=$work/state
export WB_DEATHS_A_MINUTE=1000000
on=$work/mounted keeper='' clients=() load=''

as_postgres() { (cd / && setpriv --reuid=postgres --regid=postgres --init-groups "$@"); }
sql() { as_postgres "$bin/psql" -h "$work/socket" -v ON_ERROR_STOP=1 -qAtX "$@" postgres; }
stop_postgres() { as_postgres "$bin/pg_ctl" -D "$on/data" -m "$1" -w stop >/dev/null; }

# start_postgres [OPTION...]
start_postgres() {
    local options="-c listen_addresses= -c unix_socket_directories=$work/socket $*"
    as_postgres "$bin/pg_ctl" -D "$on/data" -l "$work/postgres.log" -w start -o "$options" \
        >/dev/null
}

# attach: sets keeper and device
attach() {
    : >"$work/ready"
    "$wbctl" attach "$name" >"$work/ready" 2>>"$work/log" &
    keeper=$!
    for _ in $(seq 300); do
        device=$(sed -n 's/^ready //p' "$work/ready")
        [ -z "$device" ] || return 0
        kill -0 $keeper
        sleep 0.1
    done
    return 1
}

# detach [OPTION...]
detach() {
    "$wbctl" detach "$name" "$@" >/dev/null
    wait "$keeper"
    keeper=
}

# make_database [SIZE]: on an ext4 of that size, or of the size of the device
make_database() {
    mkdir "$on" "$work/socket"
    touch "$work/postgres.log"
    chown postgres "$work/socket" "$work/postgres.log"
    mkfs.ext4 -q "$device" "$@"
    mount "$device" "$on"
    mkdir "$on/data"
    chown postgres "$on/data"
    as_postgres "$bin/initdb" -D "$on/data" -A trust >/dev/null
}

# commits NUMBER: a client that commits one row after the other, and reads each again
commits() {
    local n=0 found
    while [ ! -e "$work/enough" ]; do
        n=$((n + 1))
        sql -c "insert into commits values ($1, $n)"
        echo "$1 $n" >>"$work/committed.$1"
        found=$(sql -c "select count(*) from commits where client = $1")
        [ "$found" = $n ] || { echo "client $1 finds $found rows of $n"; return 1; }
    done
}

# start_clients [OPTION...]: of pgbench
start_clients() {
    sql -c "create table commits (client int, n int)"
    as_postgres "$bin/pgbench" -h "$work/socket" -i -s 5 -q postgres 2>/dev/null
    for client in 1 2; do
        commits $client &
        clients+=($!)
    done
    as_postgres "$bin/pgbench" -h "$work/socket" -n -c 4 -T 100000 "$@" postgres \
        >"$work/log.pgbench" 2>&1 &
    load=$!
}

# end_clients: none of them may have seen an error; sets committed
end_clients() {
    local client
    touch "$work/enough"
    for client in "${clients[@]}"; do wait "$client"; done
    kill -0 "$load"
    pkill -INT -P "$load" || kill -INT "$load"
    wait "$load" || true
    if grep -iE "error|fatal|panic|abort" "$work/log.pgbench"; then return 1; fi
    if grep -E "PANIC|could not (read|write|fsync)" "$work/postgres.log"; then return 1; fi
    committed=$(cat "$work"/committed.* | wc -l)
}

# check_commits: all that was committed is in the database
check_commits() {
    local found
    found=$(sql -c "select count(*) from commits")
    [ "$found" -ge "$committed" ] || { echo "$found of $committed commits are left"; return 1; }
}

# give_up_database: ends what may still run, after a failure too
give_up_database() {
    stop_postgres immediate 2>/dev/null
    mountpoint -q "$on" && { timeout 30 umount "$on" || umount -l "$on"; }
    [ -n "$keeper" ] && "$wbctl" detach --force "$name" >/dev/null 2>&1
    true
}
