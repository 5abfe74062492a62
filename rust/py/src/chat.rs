//! A conversation straight to token ids: `Tokenizer.apply_chat_template`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use hfcore_engine::error::{Error, Result};
use hfcore_engine::template::{ChatTemplate, Conversation, Rendered};
use hfcore_engine::tokenizer::Tokenizer;

/// Templates that were compiled, by their source.
#[derive(Default)]
pub struct Compiled(Mutex<HashMap<String, Arc<ChatTemplate>>>);

/// Sources that are kept at most: whoever makes a template for each request has no use of them.
const KEPT: usize = 16;

impl Compiled {
    /// The template that `wanted` names or is; without it the tokenizer's own, for `tools` the one named so.
    pub fn template(
        &self,
        tokenizer: &Tokenizer,
        wanted: Option<&str>,
        tools: bool,
    ) -> Result<Arc<ChatTemplate>> {
        let own = tokenizer.chat_templates();
        let named = |name: &str| own.get(name).map(String::as_str);
        let usual = || {
            let for_tools = tools.then(|| named("tool_use")).flatten();
            for_tools.or_else(|| named("default"))
        };
        let source = match wanted {
            Some(wanted) => Some(named(wanted).unwrap_or(wanted)),
            None => usual(),
        };
        let source = source.ok_or_else(|| Error::NoChatTemplate {
            model: "the tokenizer".into(),
        })?;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(template) = kept.get(source) {
            return Ok(template.clone());
        }
        let special = tokenizer.special_tokens();
        let template = Arc::new(ChatTemplate::new("chat_template", source, special)?);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(source.to_owned(), template.clone());
        Ok(template)
    }
}

/// Token ids of a conversation, and which of them are the assistant's own words, where that was asked for.
pub struct Applied {
    pub ids: Vec<u32>,
    pub assistant_mask: Option<Vec<u32>>,
}

/// Render and encode. `parse_special`: whether special and other added tokens are such in what came out of messages too; None:
/// they are not, where the tokenizer can tell.
pub fn apply(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    given: Conversation,
    parse_special: Option<bool>,
    assistant_mask: bool,
) -> Result<Applied> {
    let rendered = template.render_conversation(given, parse_special != Some(true))?;
    let ids = encode(tokenizer, &rendered, parse_special)?;
    let assistant_mask = match assistant_mask {
        true => Some(mask(tokenizer, &rendered, &ids)?),
        false => None,
    };
    Ok(Applied {
        ids,
        assistant_mask,
    })
}

fn encode(
    tokenizer: &Tokenizer,
    rendered: &Rendered,
    parse_special: Option<bool>,
) -> Result<Vec<u32>> {
    let text = &rendered.text;
    if parse_special == Some(true) {
        return tokenizer.encode(text, false);
    }
    let segments: Vec<(&str, bool)> = rendered
        .segments
        .iter()
        .map(|segment| (&text[segment.text.clone()], segment.template))
        .collect();
    match tokenizer.encode_segments(&segments) {
        Err(Error::Unsupported { .. }) if parse_special.is_none() => tokenizer.encode(text, false),
        ids => ids,
    }
}

/// 1 for each token from the one with a span's first character to the one with its last.
fn mask(tokenizer: &Tokenizer, rendered: &Rendered, ids: &[u32]) -> Result<Vec<u32>> {
    let options = tokenizer.own_options(false);
    let whole = tokenizer.encode_with(&rendered.text, None, &options, true)?;
    if whole.ids != ids {
        return Err(Error::InvalidRequest(
            "a message holds the text of a special token: the assistant's tokens are known with \
             parse_special_in_content=True alone"
                .into(),
        ));
    }
    let mut mask = vec![0; ids.len()];
    let with = |at: usize| {
        let holds = |(start, end): &(u32, u32)| (*start as usize..*end as usize).contains(&at);
        whole.offsets.iter().position(holds)
    };
    for Range { start, end } in &rendered.spans {
        let Some(first) = with(*start).filter(|_| start < end) else {
            continue;
        };
        let last = with(end - 1).map_or(ids.len(), |last| last + 1);
        mask[first..last.max(first)].fill(1);
    }
    Ok(mask)
}
