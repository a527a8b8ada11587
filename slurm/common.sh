# Sourced by the job scripts: one process a rank on all nodes, checked before it trains, requeued when that is worth it.
# What a job asks Slurm for (account, partition, nodes, GPUs, time) is at the top of its script. Options of sbatch win
# over it, and so do sbatch's variables, for all scripts at once: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT.

# Settings of this cluster; a variable that is set already wins.
: "${SDTRAIN_ENV:=.venv/bin/activate}" # sourced first, where it exists: modules, a virtual environment
: "${SDTRAIN_CONTAINER:=}"             # words before python: apptainer exec --nv sdtrain.sif
: "${SDTRAIN_SRUN:=}"                  # more words for srun: --mpi=none, --container-image=...
: "${SDTRAIN_SCRATCH:=}"               # a node's own disk, for remote shards (there: SLURM_TMPDIR, TMPDIR or /tmp)
: "${SDTRAIN_PREFLIGHT_SEC:=30}"       # within which all ranks must have met, before training; 0 = do not check
: "${SDTRAIN_MAX_CRASHES:=3}"          # attempts in a row that leave a run at the same image before the job gives up
: "${SDTRAIN_MAX_REQUEUES:=100}"       # how often one job may be requeued at all
export SDTRAIN_CONTAINER SDTRAIN_SCRATCH

# Exit codes: 0 finished, 2 the user's mistake, 75 stopped on request with a checkpoint saved, or ended because a rank
# or decoding process died or hung, anything else a fault. All but 0 and 2 are worth another attempt while a run moves.

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
told=""

say() { printf '%s  %s\n' "$(date +%FT%T)" "$*"; }

load_environment() {
    # a virtual environment's activate script reads variables that are not set
    if [ -f "$SDTRAIN_ENV" ]; then set +u; source "$SDTRAIN_ENV"; set -u; fi
}

# Where ranks meet: the first host of the job, and a port that two jobs on one host do not share, below those that
# systems hand out by themselves.
rendezvous() {
    SDTRAIN_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    MASTER_ADDR="${SDTRAIN_HOSTS%%$'\n'*}"  # not `| head -n 1`: that may end scontrol by SIGPIPE
    [ -n "$MASTER_ADDR" ] || { say "scontrol named no host for $SLURM_JOB_NODELIST"; return 1; }
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    WORLD_SIZE="${SLURM_NTASKS:-1}"
    export MASTER_ADDR MASTER_PORT WORLD_SIZE SDTRAIN_HOSTS
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # which srun does not take over by itself
}

# on_ranks ARGS...: python ARGS, one task a rank. exec, so that signals reach Python and its exit code reaches srun. A
# rank that fails takes the others with it after two minutes, not at once: those that are about to report 75 must not be
# killed. Remote shards are kept on the node's disk, in a folder of this user alone: what lies there is believed.
on_ranks() {
    # shellcheck disable=SC2086
    exec srun --kill-on-bad-exit=0 --wait=120 $SDTRAIN_SRUN bash -c '
        export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-1}"
        scratch="${SDTRAIN_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}/sdtrain-$(id -un)"
        mkdir -p -m 700 "$scratch" 2>/dev/null && [ -O "$scratch" ] && [ ! -L "$scratch" ] && [ -w "$scratch" ] &&
            export SDTRAIN_SHARDS="${SDTRAIN_SHARDS:-$scratch/shards}"
        exec $SDTRAIN_CONTAINER python "$@"' rank "$@"
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

# obeying ARGS...: on_ranks, with signals that reach only the job script handed on.
obeying() {
    local child
    on_ranks "$@" &
    child=$!
    trap 'told=yes; say "told to stop"; kill -USR1 "$child" 2>/dev/null' USR1 TERM
    wait_for "$child"
}

# job_state: RUNNING, or what Slurm is making of this job; RUNNING also when Slurm does not answer.
job_state() {
    local facts
    facts="$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null)"
    [[ "$facts" =~ JobState=([A-Z_]+) ]] && echo "${BASH_REMATCH[1]}" || echo RUNNING
}

# over CODE ARGS...: end the job, or put it back into the queue if that is worth it.
over() {
    local code="$1" times="${SLURM_RESTART_COUNT:-0}" state
    shift
    say "ended with exit code $code"
    case "$code" in 0 | 2) exit "$code" ;; esac
    state="$(job_state)"
    if [ "$state" != RUNNING ]; then  # preempted, on a lost node, or cancelled, which a requeue would undo
        say "Slurm ends this job itself ($state)"
        exit "$code"
    fi
    if [ "$times" -ge "$SDTRAIN_MAX_REQUEUES" ]; then
        say "requeued $times times already (SDTRAIN_MAX_REQUEUES=$SDTRAIN_MAX_REQUEUES): not again"
        exit "$code"
    fi
    # shellcheck disable=SC2086
    $SDTRAIN_CONTAINER python -m sdtrain.cli requeue --most "$SDTRAIN_MAX_CRASHES" ${told:+--asked} "$@" || exit "$code"
    say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "the job could not be requeued; submit it again, it goes on"
    exit "$code"
}

# run ARGS...: check all ranks, train, and requeue the job if that is what the exit code asks for.
run() {
    local code=0
    load_environment
    rendezvous || exit 1
    say "job $SLURM_JOB_ID: $WORLD_SIZE ranks on ${SLURM_JOB_NODELIST}, requeued ${SLURM_RESTART_COUNT:-0} times"
    if [ "$SDTRAIN_PREFLIGHT_SEC" -gt 0 ]; then
        obeying -m sdtrain.cli doctor --ranks --within "$SDTRAIN_PREFLIGHT_SEC" "$@" || over $? "$@"
    fi
    obeying sdtrain/main.py "$@"; code=$?
    over "$code" "$@"
}

# once ARGS...: an sdtrain command on all ranks. It begins again by itself only where Slurm repeats the job.
once() {
    load_environment
    rendezvous || exit 1
    say "job $SLURM_JOB_ID: sdtrain $* on $WORLD_SIZE ranks"
    on_ranks -m sdtrain.cli "$@"
}
