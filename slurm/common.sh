# Sourced by the job scripts: start one training process a GPU and requeue the job when it stopped on request.
#
#   SDTRAIN_MAX_REQUEUES   how often one job may be requeued (default 100)
#   SDTRAIN_ENV            file to source first (modules, virtual environment); default .venv/bin/activate where it exists
#
# Exit codes of training: 0 finished, 75 stopped on request with a checkpoint saved, or ended because a rank or decoding
# process died or hung (requeue: the same command goes on), 2 the user's mistake,
# anything else a fault. Only 75 is worth another attempt.

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"

say() { printf '%s  %s\n' "$(date +%FT%T)" "$*"; }

load_environment() {
    local file="${SDTRAIN_ENV:-.venv/bin/activate}"
    # a virtual environment's activate script reads variables that are not set
    if [ -f "$file" ]; then set +u; source "$file"; set -u; fi
}

# Where ranks meet: the first host of the job, and a port that two jobs on one host do not share.
rendezvous() {
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    MASTER_ADDR="${hosts%%$'\n'*}"  # not `| head -n 1`: that may end scontrol by SIGPIPE
    [ -n "$MASTER_ADDR" ] || { say "scontrol named no host for $SLURM_JOB_NODELIST"; return 1; }
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    WORLD_SIZE="$SLURM_NTASKS"
    export MASTER_ADDR MASTER_PORT WORLD_SIZE
}

# train ARGS...: one task a rank. exec, so that signals reach Python and its exit code reaches srun. A rank that fails
# takes the others with it after two minutes, not at once: ranks that are about to report 75 must not be killed.
train() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    exec srun --kill-on-bad-exit=0 --wait=120 bash -c '
        export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-1}"
        exec python sdtrain/main.py "$@"' train "$@"
}

# wait_for PID: its exit code, however many signals arrive meanwhile (each ends bash's `wait`, not the process).
wait_for() {
    local code=0 again=0
    wait "$1"; code=$?
    while [ "$code" -gt 128 ] && kill -0 "$1" 2>/dev/null; do wait "$1"; code=$?; done
    if [ "$code" -gt 128 ]; then
        wait "$1" 2>/dev/null; again=$?
        [ "$again" -eq 127 ] || code=$again
    fi
    return "$code"
}

# run ARGS...: train, and put the job back into the queue if that is what the exit code asks for.
run() {
    load_environment
    rendezvous || exit 1
    local times="${SLURM_RESTART_COUNT:-0}" limit="${SDTRAIN_MAX_REQUEUES:-100}" code=0 child
    say "job $SLURM_JOB_ID: $WORLD_SIZE ranks, rendezvous $MASTER_ADDR:$MASTER_PORT, requeued $times times"
    train "$@" &
    child=$!
    # Slurm signals the ranks itself before the time limit; this is for a signal that reaches only the job script
    trap 'say "told to stop; waiting for the checkpoint"; kill -USR1 "$child" 2>/dev/null' USR1 TERM
    wait_for "$child"; code=$?
    if [ "$code" -ne 75 ]; then
        say "training ended with exit code $code"
        exit "$code"
    fi
    if [ "$times" -ge "$limit" ]; then
        say "stopped with a checkpoint, but requeued $times times already (SDTRAIN_MAX_REQUEUES=$limit): not again"
        exit 75
    fi
    say "stopped with a checkpoint: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || { say "the job could not be requeued; submit it again, it goes on"; exit 75; }
}
