"""``DENSE_HEAD``: the heads, and how boxes are chosen from what they say."""

from __future__ import annotations

from collections.abc import Mapping

from dsvt_ros.config import CENTER_BRANCHES, PROPOSAL_BRANCHES
from dsvt_ros.model.pcdet.section import Section
from dsvt_ros.model.pcdet.translation import Translation

TURNING_NMS = "multi_class_nms"
"""The suppression of the release's CenterHead, whose kernel sees every box turned by 90 degrees."""

# Constants in the code of the release's TransFusionHead, by TARGET_ASSIGNER_CONFIG.DATASET: the number of classes, the
# ones that may have a peak in every cell, and the IoU above which a box suppresses others of its class.
PROPOSAL_RULES: dict[str, tuple[int, tuple[int, ...], dict[int, float]]] = {
    "nuScenes": (10, (8, 9), {8: 0.175, 9: 0.175}),
    "Waymo": (3, (1, 2), {0: 0.7, 1: 0.7, 2: 0.7}),
}


def translate_center_head(out: Translation, head: Section, class_names: list[str]) -> None:
    """CenterHead and its post-processing."""
    head.only("CLASS_AGNOSTIC", False)
    head.only("UPSAMPLE", 1, default=1)
    out.put("model.head.norm_eps", head.number("BN_EPS", default=1e-5), head, "BN_EPS")
    branches = _branches(head, CENTER_BRANCHES, "hm")
    out.put("model.head.type", "center", head, "NAME")
    out.put("model.head.branches", branches, head, "SEPARATE_HEAD_CFG")
    out.take(head, {"SHARED_CONV_CHANNEL": "model.head.shared_channels"})
    bias = head.get("USE_BIAS_BEFORE_NORM", False)
    out.put("model.head.bias_before_norm", bias, head, "USE_BIAS_BEFORE_NORM")
    given = head.need("CLASS_NAMES_EACH_HEAD")
    if not isinstance(given, list) or not all(isinstance(group, list) for group in given):
        raise head.error("CLASS_NAMES_EACH_HEAD", f"must be a list of lists of classes, got {given!r}")
    groups = [[name for name in group if name in class_names] for group in given]
    out.put("model.head.groups", [] if groups == [class_names] else groups, head, "CLASS_NAMES_EACH_HEAD")

    post = head.section("POST_PROCESSING")
    out.take(
        post,
        {
            "SCORE_THRESH": "defaults.postprocess.score_threshold",
            "MAX_OBJ_PER_SAMPLE": "defaults.postprocess.max_candidates",
            "POST_CENTER_LIMIT_RANGE": "defaults.postprocess.center_range",
        },
    )
    _rectifier(out, post, branches)
    if post.section("NMS_CONFIG").only("NMS_TYPE", TURNING_NMS, "class_specific_nms", "nms_gpu") == "nms_gpu":
        _nms_of_groups(out, post, groups)
    else:
        _nms_of_classes(out, post, len(class_names))
    post.close()
    head.skip("NAME", "BN_MOM", "TARGET_ASSIGNER_CONFIG")
    head.close()


def translate_transfusion_head(out: Translation, head: Section, class_names: list[str]) -> None:
    """TransFusionHead and its post-processing."""
    head.only("CLASS_AGNOSTIC", False)
    head.only("ACTIVATION", "relu")
    head.section("LOSS_CONFIG").section("LOSS_CLS").only("use_sigmoid", True)
    post = head.section("POST_PROCESSING")
    if not post.get("NMS_CONFIG"):
        raise post.error(
            "NMS_CONFIG",
            "is missing: the TransFusionHead of OpenPCDet itself is another network than that of the DSVT release, "
            "which alone is known here",
        )
    targets = head.section("TARGET_ASSIGNER_CONFIG")
    dataset = targets.only("DATASET", *PROPOSAL_RULES, default="nuScenes")
    num_classes, small, overlaps = PROPOSAL_RULES[dataset]
    if len(class_names) != num_classes:
        raise targets.error(
            "DATASET",
            f"is {dataset}, for which the code of the release expects {num_classes} classes in its order; there are "
            f"{len(class_names)}",
        )
    branches = _branches(head, PROPOSAL_BRANCHES, "heatmap")
    out.put("model.head.type", "transfusion", head, "NAME")
    out.put("model.head.branches", branches, head, "SEPARATE_HEAD_CFG")
    out.take(
        head,
        {
            "HIDDEN_CHANNEL": "model.head.channels",
            "FFN_CHANNEL": "model.head.ffn_channels",
            "NUM_HEADS": "model.head.num_heads",
            "NUM_PROPOSALS": "model.head.num_proposals",
            "NMS_KERNEL_SIZE": "model.head.peak_size",
        },
    )
    out.put("model.head.small_classes", [class_names[label] for label in small], targets, "DATASET")

    out.take(
        post,
        {
            "SCORE_THRESH": "defaults.postprocess.score_threshold",
            "POST_CENTER_RANGE": "defaults.postprocess.center_range",
        },
    )
    _rectifier(out, post, branches)
    nms, proposals = post.section("NMS_CONFIG"), int(head.number("NUM_PROPOSALS"))
    nms.only("NMS_TYPE", "nms_gpu")
    nms.only("SCORE_THRES", 0)  # their spelling
    _refuse_to_cut(nms, nms.number("NMS_PRE_MAXSIZE"), proposals)
    most = min(int(nms.number("NMS_POST_MAXSIZE")), proposals)
    labels = range(num_classes)
    out.put("defaults.postprocess.nms_iou", [overlaps.get(label, 1.0) for label in labels], targets, "DATASET")
    limits = [most if label in overlaps else proposals for label in labels]
    out.put("defaults.postprocess.max_boxes", limits, nms, "NMS_POST_MAXSIZE")
    nms.skip("NMS_THRESH")  # replaced in their code
    nms.close()
    post.close()
    head.skip("NAME", "USE_BIAS_BEFORE_NORM", "NUM_CLASSES", "DROPOUT", "BN_MOMENTUM")
    head.close()


def _branches(head: Section, channels: Mapping[str, int], classes: str) -> list[str]:
    """The branches in state-dict order; the one of the classes comes last."""
    head.only("NUM_HM_CONV", 2)
    layout = head.section("SEPARATE_HEAD_CFG")
    branches = layout.section("HEAD_DICT")
    names = list(layout.need("HEAD_DICT"))
    for name in names:
        if name not in channels:
            raise branches.error(name, f"is no branch that is known here: {', '.join(channels)}")
        branch = branches.section(name)
        branch.only("out_channels", channels[name])
        branch.only("num_conv", 2)
    if ("vel" in names) != ("vel" in layout.names("HEAD_ORDER")):
        raise layout.error("HEAD_ORDER", "must name vel if, and only if, HEAD_DICT does")
    return [*names, classes]


def _rectifier(out: Translation, post: Section, branches: list[str]) -> None:
    """The weight of the predicted IoU; without that branch upstream leaves scores as they are."""
    used = post.get("USE_IOU_TO_RECTIFY_SCORE", False) and "iou" in branches
    post.skip("IOU_RECTIFIER")
    if used:
        weights = post.need("IOU_RECTIFIER")
        values = weights if isinstance(weights, list) else [weights]
        out.put("defaults.postprocess.iou_rectifier", values, post, "IOU_RECTIFIER")


def _nms_of_classes(out: Translation, post: Section, num_classes: int) -> None:
    """``multi_class_nms`` (DSVT release) and ``class_specific_nms`` (OpenPCDet): each class by itself."""
    nms, candidates = post.section("NMS_CONFIG"), int(post.number("MAX_OBJ_PER_SAMPLE"))
    out.put("defaults.postprocess.nms_classes", "own", nms, "NMS_TYPE")
    out.put("defaults.postprocess.nms_iou", nms.numbers("NMS_THRESH", num_classes), nms, "NMS_THRESH")
    _refuse_to_cut(nms, min(nms.numbers("NMS_PRE_MAXSIZE", num_classes)), candidates)
    limits = nms.numbers("NMS_POST_MAXSIZE", num_classes)
    if min(limits) < candidates:
        out.put("defaults.postprocess.max_boxes", limits, nms, "NMS_POST_MAXSIZE")
    if nms.get("SCORE_THRESH") is not None:
        raise nms.error("SCORE_THRESH", "is a second threshold, on rectified scores, which there is none of here")
    if nms.get("NMS_TYPE") == TURNING_NMS:
        out.remarks.append(
            "the DSVT release turns every box by 90 degrees before it suppresses; here boxes overlap as they lie, "
            "unless postprocess.nms_geometry is dsvt_release"
        )
    nms.close()


def _nms_of_groups(out: Translation, post: Section, groups: list[list[str]]) -> None:
    """``nms_gpu``: a box suppresses those of all classes in its group."""
    nms, candidates = post.section("NMS_CONFIG"), int(post.number("MAX_OBJ_PER_SAMPLE"))
    out.put("defaults.postprocess.nms_classes", "group", nms, "NMS_TYPE")
    out.put("defaults.postprocess.nms_iou", [nms.number("NMS_THRESH")], nms, "NMS_THRESH")
    _refuse_to_cut(nms, nms.number("NMS_PRE_MAXSIZE"), candidates)
    limit = int(nms.number("NMS_POST_MAXSIZE"))
    if limit < candidates:
        out.put("defaults.postprocess.max_boxes", [limit], nms, "NMS_POST_MAXSIZE")
        if max(map(len, groups)) > 1:
            out.remarks.append(
                f"upstream keeps at most {limit} boxes of a group of classes; here as many of each class"
            )
    nms.skip("NMS_TYPE")
    nms.close()


def _refuse_to_cut(nms: Section, limit: float, candidates: int) -> None:
    if limit < candidates:
        raise nms.error("NMS_PRE_MAXSIZE", f"is {limit:g}, which cuts the {candidates} candidates; here all take part")
