#!/bin/bash
# A recipe on the GPUs of one node, in jobs that are started again until it is done:
#   vader-nb recipes slurm > train.sh
#   sbatch --job-name=mine train.sh modelscope steps=300      the recipe, and settings to change
# The job's name is the run's: a run in runs/NAME is continued.
#SBATCH --job-name=vader
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600

recipe=$1
shift
run=runs/$SLURM_JOB_NAME

# Ten minutes before its time is up, the job asks training to end after the current step and to keep everything;
# an evaluation that is still at work after nine minutes is cut off and done anew.
again() {
    touch "$run/stop"
    (sleep 540; scontrol requeue "$SLURM_JOB_ID") &
    timer=$!
}
trap again USR1

# A preempted job gets no such signal: it goes on from the newest checkpoint.
srun accelerate launch --config_file "$(vader-nb engine ddp)" --num_processes "$SLURM_GPUS_ON_NODE" \
    -m vader_nb align config="$recipe" name="$SLURM_JOB_NAME" output_dir=runs resume=latest checkpointing_steps=10 "$@" &
training=$!
wait $training
status=$?
while kill -0 $training 2>/dev/null; do  # the signal ended the wait
    wait $training
    status=$?
done
[ -z "$timer" ] || kill $timer
if [ $status -eq 0 ] && [ ! -e "$run/report.html" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
