# Sourced by soak.sh and two_nodes.sh: a stage of seconds that has all that the real ones have, competition included.
# shellcheck shell=bash

# prepare_tiny_stage OUT: demo data and a small upcycled model, made once.
prepare_tiny_stage() {
  local out=$1 quiet=(training.max_steps=2 training.logging_steps=1 training.report_to=none deepspeed=null)
  [ -f "$out/data/pretrain.json" ] || llava-compete data demo --out "$out/data" >"$out/prepare.log" 2>&1
  if [ ! -f "$out/moe/config.json" ]; then
    NUM_GPUS=0 llava-compete train configs/demo/pretrain_align.yaml output_dir="$out/dense" "${quiet[@]}" \
      data.sources="[{name: captions, path: $out/data/pretrain.json, image_folder: $out/data/images}]" \
      model.language_model.config.num_hidden_layers=2 >>"$out/prepare.log" 2>&1
    llava-compete upcycle --config configs/demo/upcycle.yaml model.checkpoint="$out/dense" output_dir="$out/moe" \
      moe.competition_rate=0.3 >>"$out/prepare.log" 2>&1
  fi
}

# tiny_stage OUT: sets `words`, the arguments of scripts/sft.sh less output_dir: 12 steps of 8 rows, saved every 4.
tiny_stage() {
  local out=$1
  # shellcheck disable=SC2034 # the callers read it
  words=(configs/demo/sft.yaml model.checkpoint="$out/moe" training.max_steps=12 training.save_steps=4
    training.save_total_limit=2 training.logging_steps=1 training.report_to=none
    training.per_device_train_batch_size=4
    "data.sources=[{name: instructions, path: $out/data/instruct.json, image_folder: $out/data/images}]")
}
