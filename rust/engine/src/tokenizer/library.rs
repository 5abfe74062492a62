//! The `tokenizers` crate's own pipeline over a model of ours, or over its own: for offsets, pairs, and all
//! that the fast way does not do.

use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::tokenizer::PostProcessor;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper,
    PreTokenizerWrapper, TokenizerImpl, TruncationParams, TruncationStrategy,
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

/// How a text is encoded.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Put the template's tokens around the text.
    pub add_special_tokens: bool,
    /// Cut what is longer.
    pub truncation: Option<TruncationParams>,
    /// Pad what is shorter. To the batch's longest: a text alone is its batch.
    pub padding: Option<PaddingParams>,
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

    /// Encode a text or a pair. The inner error is what the options ask and cannot have.
    pub fn encode(
        &self,
        text: &str,
        pair: Option<&str>,
        options: &Options,
        with_offsets: bool,
    ) -> tokenizers::Result<Result<Encoding, String>> {
        if let Err(problem) = self.check(pair.is_some(), options) {
            return Ok(Err(problem));
        }
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
        Ok(Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            special_tokens_mask: encoding.get_special_tokens_mask().to_vec(),
            attention_mask: encoding.get_attention_mask().to_vec(),
            offsets: offsets
                .map(|&(start, end)| (place(start), place(end)))
                .collect(),
        }))
    }

    fn check(&self, pair: bool, options: &Options) -> Result<(), String> {
        let Some(truncation) = &options.truncation else {
            return Ok(());
        };
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
