"""The teacher's predictions on the training stream, on disk: distillation without the teacher."""

from moe_jax.data.teacher_cache.index import DIGITS, CacheFacts, text_facts
from moe_jax.data.teacher_cache.reader import TeacherCache, open_teacher_cache
from moe_jax.data.teacher_cache.writer import TeacherCacheWriter, check_cache_folder

__all__ = [
    "DIGITS",
    "CacheFacts",
    "TeacherCache",
    "TeacherCacheWriter",
    "check_cache_folder",
    "open_teacher_cache",
    "text_facts",
]
