//! What stands around a text's ids: the post-processor's tokens, the cut to a longest length, padding.

use tokenizers::tokenizer::{Encoding, PostProcessor, Token};
use tokenizers::{
    PaddingDirection, PaddingParams, PaddingStrategy, PostProcessorWrapper, TruncationDirection,
    TruncationParams, TruncationStrategy,
};

/// An id that stands for a text's own.
const TEXT: u32 = u32::MAX;

/// The ids before and after a text's.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub before: Vec<u32>,
    pub after: Vec<u32>,
}

/// What a post-processor does to the ids of a single text.
#[derive(Debug)]
pub(super) struct Around {
    plain: Side,
    special: Side,
    /// As the post-processor counts them, for truncation.
    added: usize,
}

impl Around {
    /// Found out by trying; `None` for a post-processor that does more than put ids around a text's.
    pub fn new(post: Option<&PostProcessorWrapper>) -> tokenizers::Result<Option<Self>> {
        let Some(post) = post else {
            return Ok(Some(Self {
                plain: Side::default(),
                special: Side::default(),
                added: 0,
            }));
        };
        let (Some(plain), Some(special)) = (side(post, false)?, side(post, true)?) else {
            return Ok(None);
        };
        Ok(Some(Self {
            plain,
            special,
            added: post.added_tokens(false),
        }))
    }

    /// What is put around a text.
    pub fn side(&self, add_special_tokens: bool) -> &Side {
        match add_special_tokens {
            true => &self.special,
            false => &self.plain,
        }
    }

    /// How many ids of a text are kept. `None` where the library has to refuse.
    pub fn room(&self, truncation: Option<&TruncationParams>, special: bool) -> Option<Room> {
        let Some(truncation) = truncation else {
            return Some(Room::All);
        };
        if truncation.strategy == TruncationStrategy::OnlySecond {
            return None;
        }
        let taken = if special { self.added } else { 0 };
        let ids = truncation.max_length.checked_sub(taken)?;
        Some(match truncation.direction {
            TruncationDirection::Right => Room::First(ids),
            TruncationDirection::Left => Room::Last(ids),
        })
    }
}

fn side(post: &PostProcessorWrapper, special: bool) -> tokenizers::Result<Option<Side>> {
    let text = Token::new(TEXT, "a".to_owned(), (0, 1));
    let encoding = Encoding::from_tokens(vec![text], 0);
    let ids = post.process(encoding, None, special)?.get_ids().to_vec();
    let mut parts = ids.split(|&id| id == TEXT);
    Ok(match (parts.next(), parts.next(), parts.next()) {
        (Some(before), Some(after), None) => Some(Side {
            before: before.to_vec(),
            after: after.to_vec(),
        }),
        _ => None,
    })
}

/// The ids of a text that are kept.
#[derive(Debug, Clone, Copy)]
pub(super) enum Room {
    All,
    First(usize),
    Last(usize),
}

impl Room {
    /// With so many ids, `start` of which are not the text's, no more need be found.
    pub fn limit(self, start: usize) -> usize {
        match self {
            Self::First(ids) => start.saturating_add(ids),
            _ => usize::MAX,
        }
    }

    /// Cut what came after `start`.
    pub fn cut(self, ids: &mut Vec<u32>, start: usize) {
        match self {
            Self::All => {}
            Self::First(room) => ids.truncate(start.saturating_add(room)),
            Self::Last(room) => {
                let extra = (ids.len() - start).saturating_sub(room);
                ids.drain(start..start + extra);
            }
        }
    }
}

/// Pad the ids of one text.
pub(super) fn pad(ids: &mut Vec<u32>, padding: &PaddingParams) {
    let mut length = match padding.strategy {
        PaddingStrategy::Fixed(length) => length,
        PaddingStrategy::BatchLongest => ids.len(),
    };
    if let Some(multiple) = padding.pad_to_multiple_of.filter(|&multiple| multiple > 0) {
        length = length.next_multiple_of(multiple);
    }
    pad_to(ids, length, padding);
}

/// Pad to `length` ids.
pub(super) fn pad_to(ids: &mut Vec<u32>, length: usize, padding: &PaddingParams) {
    let missing = length.saturating_sub(ids.len());
    match padding.direction {
        PaddingDirection::Right => ids.resize(ids.len() + missing, padding.pad_id),
        PaddingDirection::Left => {
            ids.splice(0..0, std::iter::repeat_n(padding.pad_id, missing));
        }
    }
}
