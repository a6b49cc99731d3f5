#!/bin/sh
# Start what this image is for. Everything ends in `exec`, so that signals reach the program itself:
# `docker stop` is then a goodbye and not a crash.
#
#   peer image:         handcar1:... [options of `peer join`]     or any other `peer` command
#   coordinator image:  nothing, or options of `coordinator run`  or any other `coordinator` command
set -eu

run_dir=/data/run

# Tell whether one of the arguments after the first is that option.
given() {
    option=$1
    shift
    for word in "$@"; do
        case $word in
            "$option" | "$option"=*) return 0 ;;
        esac
    done
    return 1
}

case ${HANDCAR_ROLE:-} in
    peer)
        case ${1:-} in
            handcar1:*)
                # A published port has to be a fixed one.
                given --listen "$@" || set -- --listen /ip4/0.0.0.0/tcp/31337 "$@"
                exec peer join --data-dir /data --device "${HANDCAR_DEVICE:-cpu}" "$@"
                ;;
            *) exec peer "$@" ;;
        esac
        ;;
    coordinator)
        case ${1:-} in
            "" | --host-maddr* | --announce* | --http* | --access* | --start-peers* | --stages-per-peer* | --lost-after* | --auto-rollback* | --watcher* | \
                --until-finished | --log-* | --debug)
                given --host-maddr "$@" || set -- --host-maddr /ip4/0.0.0.0/tcp/4001 "$@"
                exec coordinator run "$run_dir" "$@"
                ;;
            *) exec coordinator "$@" ;;
        esac
        ;;
    *)
        echo "entrypoint: HANDCAR_ROLE is 'peer' or 'coordinator', not '${HANDCAR_ROLE:-}'" >&2
        exit 3
        ;;
esac
