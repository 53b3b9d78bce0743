#!/usr/bin/env bash
# One night of super-resolution, from the head's host: bash night.sh. For cron, see docs/cluster.md.
# The job's id is that of the day, so that a second start on one day is refused.
set -euo pipefail

submit() {
  docker exec ray_docker ray job submit --address http://127.0.0.1:8265 "$@"
}

# A night needs a GPU node to begin with, and takes up to eight actors as they come.
submit -- python /opt/carn/deploy/hold_nodes.py --gpus 1
trap 'submit -- python /opt/carn/deploy/hold_nodes.py --none' EXIT

submit --submission-id "night-$(date +%F)" -- \
  python /opt/carn/jobs/super_resolve.py --slides s3://REPLACE_WITH_YOUR_BUCKET/incoming \
  --checkpoint s3://REPLACE_WITH_YOUR_BUCKET/runs/carn-x2 --output s3://REPLACE_WITH_YOUR_BUCKET/sr \
  --deadline 06:00 --gpus-per-actor 0.5 --max-actors 8 --log-format json
