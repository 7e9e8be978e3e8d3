#!/usr/bin/env bash
# The whole story of the paper on scikit-learn's digits, in minutes on two CPU cores; downloads no data.
#
#     bash scripts/pipeline.sh [FOLDER]        # default: outputs/story; the page is FOLDER/report/report.md
#
# Palette, causal and masked pretraining, drawing, scoring, probes of all layers and milestones, fine-tuning against training
# from scratch, report. PYTHON names another interpreter. Steps that are done are not done again.
set -euo pipefail
scripts=$(dirname "$0")
folder=${1:-outputs/story}
python=${PYTHON:-python}

step() { # the file that is there when the step is done, then its script and flags
    if [ -e "$1" ]; then return; fi
    echo
    echo "== $2 ${*:3}"
    "$python" "$scripts/$2" "${@:3}"
}

palette=$folder/palette
step "$palette/records.json" run_clusters.py --num_colors 16 --output_dir "$palette"
for objective in causal masked; do
    step "$folder/$objective/records.json" run_pretrain.py --objective "$objective" --output_dir "$folder/$objective" \
        --image_processor_name "$palette" --milestones 0.065,0.131,0.262,0.524,1
done
step "$folder/causal/completions.png" run_sample.py --model_name_or_path "$folder/causal" --num_images 16 --num_held_out 6
step "$folder/causal/score/score.json" run_score.py --model_name_or_path "$folder/causal" --num_held_out 300
for objective in causal masked; do
    step "$folder/$objective/probe/probe.json" run_linear_probe.py --model_name_or_path "$folder/$objective" \
        --labels_per_class 4 25
    step "$folder/finetuned-$objective/records.json" run_finetune.py --model_name_or_path "$folder/$objective" \
        --output_dir "$folder/finetuned-$objective" --learning_rate 3e-4
done
step "$folder/scratch/records.json" run_finetune.py --image_processor_name "$palette" --output_dir "$folder/scratch"
rm -rf "$folder/report"
step "$folder/report/report.md" run_report.py "$folder" --output_dir "$folder/report" --probe_milestones
echo "The page: $folder/report/report.md"
