"""The student and what it learns from its teachers by, from settings."""

from distill.combiner import Combiner, WeightSchedule
from distill.distiller import Distiller
from distill.errors import UserError
from distill.factory.detectors import some
from distill.schema import Config, TermConfig
from distill.terms import TERMS, FeatureTerm, KnowledgeTerm
from distill.terms.adapter import ChannelSelection
from distill.terms.published import published
from students import Detector
from teachers import inherit


def build_unit(config: Config, student: Detector, teachers: dict[str, Detector]) -> Distiller:
    """The student and its knowledge terms."""
    if config.inherit:
        try:
            # once more when the teacher is trained; here to see that it fits
            inherit(student, next(iter(teachers.values())), config.inherit)
        except ValueError as error:
            raise UserError(str(error)) from None
    taught_by = {name: config.teacher_of(name) for name in config.losses}
    terms = {
        name: build_term(loss, student, teachers[taught_by[name]], name, config.data.unlabelled is not None)
        for name, loss in config.losses.items()
    }
    for name, term in terms.items():
        if config.pruning and config.all_teachers[taught_by[name]].itself == "ema":
            check_follows(term, f"losses.{name}", config.losses[name].name)
    left_out = {
        name: 1.0 if config.balance == "gradient" else published(loss.name, student)["weight"]
        for name, loss in config.losses.items()
    }
    combiner = Combiner(
        {name: left_out[name] if loss.weight is None else loss.weight for name, loss in config.losses.items()},
        {name: WeightSchedule(**loss.schedule.model_dump()) for name, loss in config.losses.items()},
        config.train.epochs,
        config.balance,
    )
    score_threshold = config.data.unlabelled.score_threshold if config.data.unlabelled else 0.0
    return Distiller(student, terms, combiner, config.guards.bad_term == "skip", taught_by, score_threshold)


def build_term(
    config: TermConfig, student: Detector, teacher: Detector, name: str, unlabelled: bool = False
) -> KnowledgeTerm:
    """One knowledge term between two detectors; `unlabelled` tells whether there are images without boxes."""
    settings, kind = published(config.name, student) | config.model_dump(exclude_none=True), TERMS[config.name]
    settings = {key: value for key, value in settings.items() if key not in ("name", "teacher", "weight", "schedule")}
    if not teacher.detects and (kind.uses_head or (kind.uses_boxes and unlabelled)):
        reason = "a head" if kind.uses_head else "boxes, which unlabelled images lack and its teacher does not see"
        fitting = (n for n, term in TERMS.items() if not (term.uses_head or (term.uses_boxes and unlabelled)))
        raise UserError(
            f"losses.{name}.name: {config.name} goes by {reason}; from {teacher.title} learn {', '.join(fitting)}"
        )
    try:
        term = kind(student, teacher, **settings)
    except ValueError as error:
        raise UserError(f"losses.{name}.{error}") from None
    if term.uses_classes and len(teacher.unknown) == len(teacher.class_names):
        raise UserError(
            f"losses.{name}.name: {config.name} goes by class scores, and its teacher knows none of the student's "
            f"{len(teacher.unknown)} classes, {some(teacher.class_names)}; say which of its own they are in its "
            "class_map, or choose a loss over features"
        )
    return term


def check_follows(term: KnowledgeTerm, key: str, kind: str) -> None:
    """Raises a UserError where a teacher that is cut along with the student would leave a term's layers behind."""
    if all(isinstance(layer, ChannelSelection) for layer in term.output_layers):
        return
    way_out = f"say {key}.adapter=select" if isinstance(term, FeatureTerm) else "choose another loss"
    raise UserError(
        f"{key}.name: {kind} has layers as wide as its teacher, and the student's average, ema, is cut along with the "
        f"student; {way_out}, or leave out pruning"
    )
