//! The `tokenizers` crate's own pipeline over a model of ours, or over its own: for offsets, pairs, and all
//! that the fast way does not do.

use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::tokenizer::PostProcessor;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PaddingDirection, PaddingParams,
    PaddingStrategy, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl, TruncationDirection,
    TruncationParams, TruncationStrategy,
};

use super::Parts;
use super::model::{Model, Shared};

type Pipeline<M> =
    TokenizerImpl<M, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A pipeline without post-processor, truncation and padding, and the post-processor.
#[derive(Debug)]
pub(super) struct Library {
    pipeline: Kind,
    post_processor: Option<PostProcessorWrapper>,
}

#[derive(Debug)]
enum Kind {
    Ours(Box<Pipeline<Shared>>),
    Own(Box<Pipeline<ModelWrapper>>),
}

/// How a text is encoded. Made by [`Tokenizer::options`](super::Tokenizer::options).
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub(super) add_special_tokens: bool,
    pub(super) truncation: Option<TruncationParams>,
    /// To the batch's longest: a text alone is its batch.
    pub(super) padding: Option<PaddingParams>,
}

/// What a caller asks of an encoding, in transformers' words. `None`: what the file sets.
#[derive(Debug, Clone, Default)]
pub struct Wishes<'a> {
    /// `"longest_first"`, `"only_first"`, `"only_second"` or `"do_not_truncate"`.
    pub truncation: Option<&'a str>,
    /// `"longest"`, `"max_length"` or `"do_not_pad"`.
    pub padding: Option<&'a str>,
    /// The most ids, or with the padding of that name exactly so many; special tokens included.
    pub max_length: Option<usize>,
    pub pad_to_multiple_of: Option<usize>,
    /// Which end is cut: `"left"` or `"right"`.
    pub truncation_side: Option<&'a str>,
    /// Where padding goes: `"left"` or `"right"`.
    pub padding_side: Option<&'a str>,
}

const STRATEGIES: [&str; 4] = [
    "longest_first",
    "only_first",
    "only_second",
    "do_not_truncate",
];
const PADDINGS: [&str; 3] = ["longest", "max_length", "do_not_pad"];

fn one_of(what: &str, name: &str, known: &[&str]) -> Result<usize, String> {
    let at = known.iter().position(|known| *known == name);
    at.ok_or_else(|| format!("{what} must be one of {}, got {name:?}", known.join(", ")))
}

fn is_left(what: &str, side: &str) -> Result<bool, String> {
    Ok(one_of(what, side, &["left", "right"])? == 0)
}

impl Wishes<'_> {
    /// The truncation they ask for, over the file's.
    pub(super) fn truncation(
        &self,
        file: Option<&TruncationParams>,
    ) -> Result<Option<TruncationParams>, String> {
        let strategy = match self.truncation {
            Some(name) => match one_of("truncation", name, &STRATEGIES)? {
                0 => Some(TruncationStrategy::LongestFirst),
                1 => Some(TruncationStrategy::OnlyFirst),
                2 => Some(TruncationStrategy::OnlySecond),
                _ => None,
            },
            None => file.map(|file| file.strategy),
        };
        let direction = match self.truncation_side {
            Some(side) => match is_left("truncation_side", side)? {
                true => TruncationDirection::Left,
                false => TruncationDirection::Right,
            },
            None => file.map_or(TruncationDirection::Right, |file| file.direction),
        };
        let Some(strategy) = strategy else {
            return match self.truncation_side {
                Some(_) => Err("truncation_side needs a truncation, got none".to_owned()),
                None => Ok(None),
            };
        };
        let max_length = self.max_length.or(file.map(|file| file.max_length));
        let max_length =
            max_length.ok_or_else(|| "truncation needs a max_length, got none".to_owned())?;
        Ok(Some(TruncationParams {
            direction,
            max_length,
            strategy,
            stride: 0,
        }))
    }

    /// The padding they ask for, over the file's. `pad`: the padding token and its id, if there is one.
    pub(super) fn padding(
        &self,
        file: Option<&PaddingParams>,
        pad: Option<(String, u32)>,
    ) -> Result<Option<PaddingParams>, String> {
        let strategy = match self.padding {
            Some(name) => match one_of("padding", name, &PADDINGS)? {
                0 => Some(PaddingStrategy::BatchLongest),
                1 => {
                    let problem =
                        || "padding \"max_length\" needs a max_length, got none".to_owned();
                    Some(PaddingStrategy::Fixed(self.max_length.ok_or_else(problem)?))
                }
                _ => None,
            },
            None => file.map(|file| file.strategy.clone()),
        };
        let left = self
            .padding_side
            .map(|side| is_left("padding_side", side))
            .transpose()?;
        let Some(strategy) = strategy else {
            return match self.pad_to_multiple_of.is_some() || left.is_some() {
                true => {
                    Err("pad_to_multiple_of and padding_side need a padding, got none".to_owned())
                }
                false => Ok(None),
            };
        };
        let known = file.map(|file| (file.pad_token.clone(), file.pad_id));
        let (pad_token, pad_id) = known
            .or(pad)
            .ok_or_else(|| "padding needs a pad_token, and the tokenizer names none".to_owned())?;
        let padding = PaddingParams {
            strategy,
            direction: match left {
                Some(true) => PaddingDirection::Left,
                Some(false) => PaddingDirection::Right,
                None => file.map_or(PaddingDirection::Right, |file| file.direction),
            },
            pad_to_multiple_of: match self.pad_to_multiple_of {
                Some(multiple) => Some(multiple),
                None => file.and_then(|file| file.pad_to_multiple_of),
            },
            pad_id,
            pad_type_id: file.map_or(0, |file| file.pad_type_id),
            pad_token,
        };
        let longest = match padding.strategy {
            PaddingStrategy::Fixed(length) => length,
            PaddingStrategy::BatchLongest => 0,
        };
        let longest = longest.max(padding.pad_to_multiple_of.unwrap_or(0));
        match longest > super::MAX_PADDING || padding.pad_to_multiple_of == Some(0) {
            true => Err(format!(
                "padding must be to 1 to {} tokens, got {longest}",
                super::MAX_PADDING
            )),
            false => Ok(Some(padding)),
        }
    }
}

/// Ids and what belongs to each: vectors of one length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    pub ids: Vec<u32>,
    /// Which text: 0, or 1 for the second of a pair; what the template says for its own tokens.
    pub type_ids: Vec<u32>,
    /// 1 for the template's tokens and padding.
    pub special_tokens_mask: Vec<u32>,
    /// 0 for padding.
    pub attention_mask: Vec<u32>,
    /// Start and end in code points; (0, 0) where offsets were not asked for.
    pub offsets: Vec<(u32, u32)>,
}

impl Encoding {
    /// Pad to `length` ids, as `padding` says.
    pub(super) fn pad(&mut self, length: usize, padding: &PaddingParams) {
        let missing = length.saturating_sub(self.ids.len());
        let left = matches!(padding.direction, PaddingDirection::Left);
        fill(&mut self.ids, padding.pad_id, missing, left);
        fill(&mut self.type_ids, padding.pad_type_id, missing, left);
        fill(&mut self.special_tokens_mask, 1, missing, left);
        fill(&mut self.attention_mask, 0, missing, left);
        fill(&mut self.offsets, (0, 0), missing, left);
    }
}

fn fill<T: Clone>(values: &mut Vec<T>, value: T, missing: usize, left: bool) {
    let at = if left { 0 } else { values.len() };
    values.splice(at..at, std::iter::repeat_n(value, missing));
}

impl Library {
    /// Build the pipeline over a model of ours. Errors are the crate's.
    pub fn new(model: &Arc<Model>, parts: &Parts) -> tokenizers::Result<Self> {
        let part = |json: &Json| json.clone();
        let mut pipeline: Pipeline<Shared> = TokenizerImpl::new(Shared(model.clone()));
        let normalizer: Option<NormalizerWrapper> =
            serde_json::from_value(part(&parts.normalizer))?;
        pipeline.with_normalizer(normalizer)?;
        let pre_tokenizer: Option<PreTokenizerWrapper> =
            serde_json::from_value(part(&parts.pre_tokenizer))?;
        pipeline.with_pre_tokenizer(pre_tokenizer);
        pipeline.add_tokens(parts.added_tokens.iter().cloned())?;
        let post_processor = serde_json::from_value(part(&parts.post_processor))?;
        Ok(Self {
            pipeline: Kind::Ours(Box::new(pipeline)),
            post_processor,
        })
    }

    /// The pipeline of a tokenizer of the crate.
    pub fn of_tokenizer(
        tokenizer: &tokenizers::Tokenizer,
        post_processor: Option<PostProcessorWrapper>,
    ) -> Self {
        let mut pipeline = tokenizer.clone().into_inner();
        pipeline.with_post_processor(None::<PostProcessorWrapper>);
        pipeline.with_padding(None);
        // Without truncation nothing is checked that could fail.
        let _ = pipeline.with_truncation(None);
        Self {
            pipeline: Kind::Own(Box::new(pipeline)),
            post_processor,
        }
    }

    /// How many tokens the post-processor adds.
    pub fn added_tokens(&self, pair: bool) -> usize {
        self.post_processor
            .as_ref()
            .map_or(0, |post| post.added_tokens(pair))
    }

    /// Encode a text or a pair, with options that [`check`](Self::check) has found good.
    pub fn encode(
        &self,
        text: &str,
        pair: Option<&str>,
        options: &Options,
        with_offsets: bool,
    ) -> tokenizers::Result<Encoding> {
        let first = self.sequence(text, with_offsets)?;
        let second = pair
            .map(|pair| self.sequence(pair, with_offsets))
            .transpose()?;
        let second = second.map(|mut second| {
            second.set_type_ids(vec![1; second.len()]);
            second
        });
        let mut around: Pipeline<Shared> = TokenizerImpl::new(Shared(Arc::new(Model::none())));
        around.with_post_processor(self.post_processor.clone());
        around.with_truncation(options.truncation.clone())?;
        around.with_padding(options.padding.clone());
        let encoding = around.post_process(first, second, options.add_special_tokens)?;
        let place = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        let offsets = encoding.get_offsets().iter();
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            special_tokens_mask: encoding.get_special_tokens_mask().to_vec(),
            attention_mask: encoding.get_attention_mask().to_vec(),
            offsets: offsets
                .map(|&(start, end)| (place(start), place(end)))
                .collect(),
        })
    }

    /// What is wrong with a truncation of a text or a pair.
    pub fn check(&self, pair: bool, truncation: &TruncationParams) -> Result<(), String> {
        if truncation.strategy == TruncationStrategy::OnlySecond && !pair {
            return Err("truncation \"only_second\" needs a pair, got one text".to_owned());
        }
        let (added, max) = (self.added_tokens(pair), truncation.max_length);
        let room = max
            .checked_sub(added)
            .filter(|&room| room > truncation.stride);
        match room {
            Some(_) => Ok(()),
            None => Err(format!(
                "max_length must be more than the {added} special tokens and the stride {}, got {max}",
                truncation.stride
            )),
        }
    }

    fn sequence(&self, text: &str, with_offsets: bool) -> tokenizers::Result<tokenizers::Encoding> {
        match (&self.pipeline, with_offsets) {
            (Kind::Ours(pipeline), true) => pipeline.encode_char_offsets(text, false),
            (Kind::Ours(pipeline), false) => pipeline.encode_fast(text, false),
            (Kind::Own(pipeline), true) => pipeline.encode_char_offsets(text, false),
            (Kind::Own(pipeline), false) => pipeline.encode_fast(text, false),
        }
    }
}
