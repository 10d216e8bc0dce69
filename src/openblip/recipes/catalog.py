"""The recipes by the names the command line calls them."""

from collections.abc import Callable
from dataclasses import dataclass

from openblip.recipes.any_run import AnyRun
from openblip.recipes.blip2_fine_tuning import blip2_caption, blip2_instruct, blip2_retrieval, blip2_vqa
from openblip.recipes.blip2_mini import (
    blip2_mini_scratch_opt,
    blip2_mini_scratch_t5,
    blip2_mini_stage1,
    blip2_mini_stage2_opt,
    blip2_mini_stage2_t5,
)
from openblip.recipes.blip2_mini_language import blip2_mini_opt, blip2_mini_t5
from openblip.recipes.blip2_stage1 import blip2_stage1, blip2_stage1_vit_l
from openblip.recipes.blip2_stage2 import blip2_stage2_opt, blip2_stage2_t5
from openblip.recipes.blip_base import blip_base
from openblip.recipes.blip_large import blip_large
from openblip.recipes.blip_mini import blip_mini, blip_mini_captioner, blip_mini_filter
from openblip.recipes.blip_mini_tasks import (
    blip_mini_nlvr,
    blip_mini_video_qa,
    blip_mini_video_retrieval,
    blip_mini_visdial,
    blip_mini_vqa,
)
from openblip.recipes.caption import caption, caption_large
from openblip.recipes.filter import filter_, filter_large, retrieval_flickr
from openblip.recipes.nlvr import nlvr
from openblip.recipes.run import Run
from openblip.recipes.video import video_qa, video_retrieval
from openblip.recipes.visdial import visdial
from openblip.recipes.vqa import vqa

RECIPES: dict[str, Callable[[], AnyRun]] = {
    "blip-mini": blip_mini,
    "blip-mini-captioner": blip_mini_captioner,
    "blip-mini-filter": blip_mini_filter,
    "blip-mini-vqa": blip_mini_vqa,
    "blip-mini-nlvr": blip_mini_nlvr,
    "blip-mini-visdial": blip_mini_visdial,
    "blip-mini-video-retrieval": blip_mini_video_retrieval,
    "blip-mini-video-qa": blip_mini_video_qa,
    "blip-base": blip_base,
    "blip-large": blip_large,
    "caption": caption,
    "caption-large": caption_large,
    "filter": filter_,
    "filter-large": filter_large,
    "retrieval-flickr": retrieval_flickr,
    "vqa": vqa,
    "nlvr": nlvr,
    "visdial": visdial,
    "video-retrieval": video_retrieval,
    "video-qa": video_qa,
    "blip2-mini-opt": blip2_mini_opt,
    "blip2-mini-t5": blip2_mini_t5,
    "blip2-stage1": blip2_stage1,
    "blip2-stage1-vit-l": blip2_stage1_vit_l,
    "blip2-stage2-opt": blip2_stage2_opt,
    "blip2-stage2-t5": blip2_stage2_t5,
    "blip2-caption": blip2_caption,
    "blip2-vqa": blip2_vqa,
    "blip2-retrieval": blip2_retrieval,
    "blip2-instruct": blip2_instruct,
    "blip2-mini-stage1": blip2_mini_stage1,
    "blip2-mini-stage2-opt": blip2_mini_stage2_opt,
    "blip2-mini-stage2-t5": blip2_mini_stage2_t5,
    "blip2-mini-scratch-opt": blip2_mini_scratch_opt,
    "blip2-mini-scratch-t5": blip2_mini_scratch_t5,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The three trainings of a bootstrap round."""

    pretrain: Run
    captioner: Run
    filter: Run


FAMILIES: dict[str, Callable[[], Family]] = {
    "blip-mini": lambda: Family(
        pretrain=blip_mini(), captioner=blip_mini_captioner(), filter=blip_mini_filter()
    ),
    "blip-base": lambda: Family(pretrain=blip_base(), captioner=caption(), filter=filter_()),
    "blip-large": lambda: Family(pretrain=blip_large(), captioner=caption_large(), filter=filter_large()),
}
