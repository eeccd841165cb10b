#!/usr/bin/env bash
# Fetches the data of the real recipes into playground/data, in the layout that configs/ name (see playground/README.md).
#   bash scripts/download_data.sh [--dry-run] pretrain|sft|pft|all ...
# pretrain: LLaVA-Pretrain 558K (27 GB).  sft: the 665K mix and its image sets (95 GB).  pft: ALLaVA captions (60 GB).
# Downloads go on where they stopped; archives are tested before they are unpacked, beside the target and renamed; each
# finished part leaves a stamp and is skipped from then on. Afterwards: llava-compete data check CONFIG.
# DATA_ROOT chooses another folder, HF_ENDPOINT a mirror of the hub; KEEP_ARCHIVES=1 keeps the archives.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT/playground/data}
HUB=${HF_ENDPOINT:-https://huggingface.co}/datasets
dry_run=no
missing=0

# fetch URL FILE: download to FILE.part, go on after an interruption, rename when whole.
fetch() {
  local url=$1 file=$2
  if [ -s "$file" ]; then return; fi
  mkdir -p "$(dirname "$file")"
  say "$(basename "$file") <- $url"
  # A server that answers "range not satisfiable" has nothing more to send: the part is whole.
  local status=0
  curl --fail --location --retry 5 --retry-delay 5 --continue-at - --progress-bar --output "$file.part" "$url" || status=$?
  if [ "$status" -ne 0 ] && ! part_is_whole "$url" "$file.part"; then
    die "$url: download failed (curl status $status); run the same command again to go on"
  fi
  mv "$file.part" "$file"
}

# part_is_whole URL PART: the part has as many bytes as the server names.
part_is_whole() {
  local size
  size=$(curl --silent --fail --location --head "$1" | awk 'tolower($1)=="content-length:" {n=$2} END {print n+0}') || return 1
  [ -f "$2" ] && [ "$size" -gt 0 ] && [ "$(stat -c %s "$2")" -eq "$size" ]
}

# finished NAME: whether this part is there; in a dry run, say if it is not and pretend.
finished() {
  if [ -f "$DATA_ROOT/.done/$1" ]; then return 0; fi
  missing=$((missing + 1))
  if [ "$dry_run" = yes ]; then
    printf 'missing: %s\n' "$1"
    return 0
  fi
  return 1
}

mark_finished() {
  mkdir -p "$DATA_ROOT/.done"
  date -u +%FT%TZ >"$DATA_ROOT/.done/$1"
}

# json NAME URL FILE ROWS: an annotation file, which must hold at least ROWS rows.
json() {
  local name=$1 url=$2 file=$DATA_ROOT/$3 rows=$4 found
  if finished "$name"; then return; fi
  fetch "$url" "$file"
  found=$({ grep -o '"conversations"' "$file" || true; } | wc -l)
  if [ "$found" -lt "$rows" ]; then
    mv "$file" "$file.bad"
    die "$file has $found rows, expected at least $rows; it is set aside as $file.bad: run again"
  fi
  mark_finished "$name"
}

# images NAME URL FOLDER MOVE COUNT: a zip of images. MOVE is the folder inside the zip that becomes FOLDER ("." = all).
images() {
  local name=$1 url=$2 folder=$DATA_ROOT/$3 move=$4 count=$5 archive found
  if finished "$name"; then return; fi
  archive=$DATA_ROOT/.archives/$name.zip
  fetch "$url" "$archive"
  say "$name: testing and unpacking"
  if ! unzip -tqq "$archive"; then
    rm -f "$archive"
    die "$archive is damaged and was removed: run again"
  fi
  rm -rf "$folder.partial"
  mkdir -p "$folder.partial"
  unzip -qq -o "$archive" -d "$folder.partial"
  found=$(find "$folder.partial/$move" -type f | wc -l)
  if [ "$found" -lt "$count" ]; then
    die "$name: found $found images in $move, expected at least $count"
  fi
  mkdir -p "$folder"
  # Hard links add to a folder that several archives fill, and cost no space.
  cp -al "$folder.partial/$move/." "$folder/"
  rm -rf "$folder.partial"
  if [ -z "${KEEP_ARCHIVES:-}" ]; then rm -f "$archive"; fi
  mark_finished "$name"
}

get_pretrain() {
  local from=$HUB/liuhaotian/LLaVA-Pretrain/resolve/main
  json llava_pretrain_json "$from/blip_laion_cc_sbu_558k.json" LLaVA-Pretrain/blip_laion_cc_sbu_558k.json 558128
  images llava_pretrain_images "$from/images.zip" LLaVA-Pretrain/images . 558128
}

get_sft() {
  json llava_mix665k "$HUB/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json" \
    llava_v1_5_mix665k.json 665298
  images coco_train2017 http://images.cocodataset.org/zips/train2017.zip coco/train2017 train2017 118287
  images gqa https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip gqa/images images 148854
  images textvqa https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip textvqa/train_images train_images 25119
  images vg_1 https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip vg/VG_100K VG_100K 64346
  images vg_2 https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip vg/VG_100K_2 VG_100K_2 43903
  # The original pictures have left the web; this archive, made for LLaVA's mix, has what that names.
  images ocr_vqa "$HUB/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip" \
    .ocr_vqa_unpacked . 80000
  if [ "$dry_run" = no ] && [ -d "$DATA_ROOT/.ocr_vqa_unpacked" ]; then
    # Wherever the archive keeps them: all files into one folder, as .jpg, which is how the mix names them.
    mkdir -p "$DATA_ROOT/ocr_vqa/images"
    find "$DATA_ROOT/.ocr_vqa_unpacked" -type f -exec sh -c '
      for file in "$@"; do base=${file##*/}; mv "$file" "$0/${base%.*}.jpg"; done' "$DATA_ROOT/ocr_vqa/images" {} +
    rm -rf "$DATA_ROOT/.ocr_vqa_unpacked"
  fi
}

get_pft() {
  local from=$HUB/FreedomIntelligence/ALLaVA-4V/resolve/main part
  for part in Caption Instruct; do
    json "allava_laion_$part" "$from/allava_laion/ALLaVA-$part-LAION-4V.json" "allava_laion/ALLaVA-$part-LAION-4V.json" 400000
    json "allava_vflan_$part" "$from/allava_vflan/ALLaVA-$part-VFLAN-4V.json" "allava_vflan/ALLaVA-$part-VFLAN-4V.json" 150000
  done
  for part in 0 1 2 3 4 5 6 7 8 9; do
    images "allava_laion_images_$part" "$from/allava_laion/image_chunks/images_$part.zip" \
      "allava_laion/.unpacked_$part" . 1
    if [ "$dry_run" = no ] && [ -d "$DATA_ROOT/allava_laion/.unpacked_$part" ]; then
      mkdir -p "$DATA_ROOT/allava_laion/images"
      find "$DATA_ROOT/allava_laion/.unpacked_$part" -type f -exec mv -t "$DATA_ROOT/allava_laion/images" {} +
      rm -rf "$DATA_ROOT/allava_laion/.unpacked_$part"
    fi
  done
  images vision_flan "$HUB/Vision-Flan/vision-flan_191-task_1k/resolve/main/image_191-task_1k.zip" \
    allava_vflan/images . 150000
}

parts=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=yes ;;
    pretrain | sft | pft) parts+=("$argument") ;;
    all) parts+=(pretrain sft pft) ;;
    *) die "scripts/download_data.sh: unknown argument '$argument' (expected pretrain, sft, pft, all or --dry-run)" ;;
  esac
done
[ "${#parts[@]}" -gt 0 ] || die "scripts/download_data.sh: name what to fetch: pretrain, sft, pft or all"
if [ "$dry_run" = no ]; then
  for tool in curl unzip; do
    command -v "$tool" >/dev/null || die "$tool is needed: install it first"
  done
fi
for part in "${parts[@]}"; do "get_$part"; done
if [ "$dry_run" = yes ]; then
  printf '%s part(s) missing in %s\n' "$missing" "$DATA_ROOT"
else
  say "$DATA_ROOT is complete for: ${parts[*]}. Next: llava-compete data check CONFIG"
fi
