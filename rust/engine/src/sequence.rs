//! One request, from its prompt to its finish reason. Knows neither the model nor the cache's pages.

use std::time::{Duration, Instant};

use crate::constraint::{Aside, Constraint};
use crate::draft::Drafter;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::response::{CallDelta, Parser};
use crate::sampling::{Sampled, Sampler};
use crate::stop::StopBuffer;

/// Turns one request's token ids into text, as its characters complete.
pub trait Text: Send {
    /// Take a token; the text that is now certain, often empty inside a character.
    fn push(&mut self, id: u32) -> String;
    /// No token follows: the text still held back.
    fn finish(&mut self) -> String;
}

/// What turns one request's tokens into an answer.
pub struct Parts {
    pub text: Box<dyn Text>,
    /// What the text must be, if anything.
    pub constraint: Option<Constraint>,
    /// Tells text, thoughts and tool calls apart; none: all is text.
    pub parser: Option<Parser>,
}

impl From<Box<dyn Text>> for Parts {
    fn from(text: Box<dyn Text>) -> Self {
        Self {
            text,
            constraint: None,
            parser: None,
        }
    }
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// It ended by itself, after calling tools.
    ToolCalls,
}

impl FinishReason {
    /// OpenAI's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What a request cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Generated tokens, an end token included.
    pub completion_tokens: usize,
    /// Those of them whose text is a thought's; none where thoughts are not told from text.
    pub reasoning_tokens: Option<usize>,
    /// From submit to the first token.
    pub time_to_first_token: Duration,
    /// From submit to the last.
    pub total_time: Duration,
}

/// A token's log probability, and its likeliest rivals'. Of a generated token: in the distribution
/// it was drawn from, see [`Sampled::logprob`]. Of a prompt's: in the model's own.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
    /// `top_logprobs` tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What one decoded token brought. A completion's last carries its finish reason and usage.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Which of the request's `n` completions, from 0.
    pub index: usize,
    /// New text; empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// New text of the model's thoughts, which `text` does not have.
    pub reasoning: String,
    /// What it adds to tool calls.
    pub tool_calls: Vec<CallDelta>,
    /// The tokens decoded, an end token included.
    pub token_ids: Vec<u32>,
    /// One per token when `logprobs` is on, else empty.
    pub logprobs: Vec<TokenLogprob>,
    /// Of the prompt's tokens from the second on, in a request's first delta, when asked for.
    pub prompt_logprobs: Option<Vec<TokenLogprob>>,
    pub finish_reason: Option<FinishReason>,
    pub usage: Option<Usage>,
}

impl Delta {
    /// Add what came after it. Pieces of one call become one.
    pub(crate) fn append(&mut self, more: Self) {
        self.text += &more.text;
        self.reasoning += &more.reasoning;
        self.token_ids.extend(more.token_ids);
        self.logprobs.extend(more.logprobs);
        for piece in more.tool_calls {
            match self.tool_calls.last_mut() {
                Some(call) if call.index == piece.index => call.arguments += &piece.arguments,
                _ => self.tool_calls.push(piece),
            }
        }
        self.finish_reason = more.finish_reason.or(self.finish_reason);
        self.usage = more.usage.or(self.usage);
    }
}

/// A request under way.
pub struct Sequence {
    /// Prompt, then output.
    ids: Vec<u32>,
    prompt: usize,
    /// How many of `ids` have keys and values in the cache.
    cached: usize,
    /// Guesses what comes next, if that is wanted.
    drafter: Option<Drafter>,
    /// What the next step looks at beyond `ids`.
    guessed: Vec<u32>,
    /// `ids` never grows beyond this.
    limit: usize,
    min_tokens: usize,
    /// Tokens that end the text; banned before `min_tokens`.
    ends: Vec<u32>,
    sampler: Sampler,
    text: Box<dyn Text>,
    constraint: Option<Constraint>,
    /// The text was led to an early end, for want of tokens.
    cut_short: bool,
    parser: Option<Parser>,
    reasoning_tokens: usize,
    stop: StopBuffer,
    /// The prompt's log probabilities so far, from the second token on; none once they are out, or
    /// not wanted.
    judged: Option<Vec<TokenLogprob>>,
    submitted: Instant,
    first_token: Option<Instant>,
}

impl Sequence {
    /// A request of `ids` (not empty, fewer than `context`), ending at one of `eos_ids` or of the
    /// options' own end tokens, at a stop string, at `max_tokens` or at the end of the context.
    pub fn new(
        ids: Vec<u32>,
        options: &Options,
        eos_ids: &[u32],
        parts: Parts,
        context: usize,
    ) -> Self {
        let prompt = ids.len();
        let mut ends = options.stop_token_ids.clone();
        if !options.ignore_eos {
            ends.extend_from_slice(eos_ids);
        }
        let wanted = options.max_tokens.unwrap_or(usize::MAX);
        Self {
            limit: prompt.saturating_add(wanted).min(context),
            prompt,
            cached: 0,
            drafter: None,
            guessed: Vec::new(),
            min_tokens: options.min_tokens,
            ends,
            sampler: Sampler::new(options, &ids),
            text: parts.text,
            constraint: parts.constraint,
            cut_short: false,
            parser: parts.parser,
            reasoning_tokens: 0,
            stop: StopBuffer::new(&options.stop),
            judged: options.prompt_logprobs.then(Vec::new),
            submitted: Instant::now(),
            first_token: None,
            ids,
        }
    }

    /// The same, guessing its next tokens if `wanted`.
    pub fn guessing(self, wanted: bool) -> Self {
        Self {
            drafter: wanted.then(Drafter::default),
            ..self
        }
    }

    /// Prompt, then output.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many of them have keys and values in the cache.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens known so far, prompt and output.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Never: a request has a prompt.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub fn prompt_tokens(&self) -> usize {
        self.prompt
    }

    pub fn completion_tokens(&self) -> usize {
        self.ids.len() - self.prompt
    }

    pub fn submitted(&self) -> Instant {
        self.submitted
    }

    /// Tokens whose keys and values are not in the cache yet; the next token needs them all.
    pub fn pending(&self) -> usize {
        self.ids.len() - self.cached
    }

    /// One known token away from its next one, and past its prompt.
    pub fn decoding(&self) -> bool {
        self.pending() == 1 && self.completion_tokens() > 0
    }

    /// Rows of a step that it wants: for the tokens it knows, and those it guesses.
    pub fn rows(&self) -> usize {
        self.pending() + self.guessed.len()
    }

    /// How many tokens it may guess. None where it does not: within a grammar, which says itself what must come, and while
    /// it does not decode.
    pub fn may_guess(&self) -> Option<usize> {
        let bound = self.constraint.as_ref().is_some_and(|c| !c.free());
        let guesses = self.drafter.is_some() && self.decoding() && !self.wants_all_logits();
        // One token comes anyway.
        (guesses && !bound).then(|| self.limit.saturating_sub(self.ids.len() + 1))
    }

    /// How likely each token is, as its own text goes on, to come true if those before it do.
    pub fn chances(&mut self) -> impl Iterator<Item = f32> {
        let Self { drafter, ids, .. } = self;
        drafter.iter_mut().flat_map(|drafter| {
            drafter.follow(ids);
            drafter.chances(ids.len())
        })
    }

    /// Have the next step look at `n` tokens too, as its own text goes on.
    pub fn guess(&mut self, n: usize) {
        if let Some(drafter) = &self.drafter {
            self.guessed = drafter.guess(&self.ids, n);
        }
    }

    /// Have the next step look at these tokens too.
    pub fn guess_these(&mut self, tokens: Vec<u32>) {
        self.guessed = tokens;
    }

    /// The tokens of its next `n` rows, to `out`; the position of the first.
    pub fn next(&self, n: usize, out: &mut Vec<u32>) -> usize {
        out.clear();
        let known = self.ids[self.cached..].iter();
        out.extend(known.chain(&self.guessed).take(n));
        self.cached
    }

    /// The next `n` rows have run; how many of them were guesses.
    pub fn ran(&mut self, n: usize) -> usize {
        let known = n.min(self.pending());
        self.cached += known;
        self.guessed.truncate(n - known);
        self.guessed.len()
    }

    /// How many of the tokens from `before` on are as guessed: their keys and values are there. With
    /// the first that is not, the guesses after it are void.
    pub fn confirm(&mut self, before: usize) -> usize {
        let new = &self.ids[before..];
        let right = new
            .iter()
            .zip(&self.guessed)
            .take_while(|(a, b)| a == b)
            .count();
        self.cached += right;
        match right == new.len() {
            true => drop(self.guessed.drain(..right)),
            false => self.guessed.clear(),
        }
        right
    }

    /// The cache was taken away; everything known runs again.
    pub fn forget_cache(&mut self) {
        self.cached = 0;
        self.guessed.clear();
        if let Some(judged) = &mut self.judged {
            judged.clear();
        }
    }

    /// Whether the logits of every token that runs are wanted, not those of the last alone.
    pub fn wants_all_logits(&self) -> bool {
        self.judged.is_some()
    }

    /// How many of the next `n` tokens, the last ones, must come back with their logits.
    pub fn rows_wanted(&self, n: usize) -> usize {
        match self.wants_all_logits() {
            true => n,
            false => (n + 1).saturating_sub(self.pending()),
        }
    }

    /// The next `n` tokens are about to run: begin what choosing a token after them will need.
    pub fn prepare(&mut self, n: usize, aside: &mut Aside) {
        if n >= self.pending()
            && let Some(constraint) = &mut self.constraint
        {
            constraint.prepare(aside);
        }
    }

    /// The tokens that may follow, a bit each, where that is known by now; see `batch::Allowed`.
    pub fn allowed(&mut self) -> Option<&[u32]> {
        self.constraint.as_mut()?.made()
    }

    /// Take one row of the logits that were wanted, `[vocab_size]`: for the prompt's next token, or
    /// to choose a token after the last.
    ///
    /// # Errors
    /// `Internal` when the logits allow no token.
    pub fn take(&mut self, logits: &[f32]) -> Result<Option<Delta>> {
        if let Some(judged) = &mut self.judged
            && judged.len() + 1 < self.prompt
        {
            let token = self.ids[judged.len() + 1];
            judged.extend(logprob_of(self.sampler.judge(logits, token)?));
            return Ok(None);
        }
        let delta = self.advance(logits)?;
        Ok(Some(Delta {
            prompt_logprobs: self.judged.take(),
            ..delta
        }))
    }

    /// Choose the next token from its logits, `[vocab_size]`, and take it, and those that a grammar
    /// forces after it.
    ///
    /// # Errors
    /// `Internal` when the logits allow no token; `InvalidRequest` when a grammar is too costly.
    pub fn advance(&mut self, logits: &[f32]) -> Result<Delta> {
        let sampled = self.choose(logits)?;
        let chosen = sampled.token;
        let ends = self.ends.contains(&chosen);
        let left = self.limit.saturating_sub(self.ids.len() + 1);
        // All that is forced is taken before any of it is read: only the last piece may be the end.
        let forced = match &mut self.constraint {
            Some(constraint) if !ends => constraint.forced(left),
            _ => Vec::new(),
        };
        let mut delta = self.push(sampled, forced.is_empty());
        for (n, token) in forced.iter().enumerate() {
            let certain = self.sampler.certain(*token);
            let more = self.push(certain, n + 1 == forced.len());
            delta.append(more);
        }
        Ok(delta)
    }

    fn choose(&mut self, logits: &[f32]) -> Result<Sampled> {
        /// Tokens that may prove too long for what is left before the shortest way is taken.
        const ATTEMPTS: usize = 8;
        let early = self.completion_tokens() < self.min_tokens;
        let left = self.limit.saturating_sub(self.ids.len() + 1);
        let Some(constraint) = &mut self.constraint else {
            let banned: &[u32] = if early { &self.ends } else { &[] };
            return self.sampler.sample(logits, None, banned);
        };
        let mask = constraint.mask()?;
        let free = constraint.free();
        let allowed = mask.as_ref().map(|mask| mask.as_slice());
        let open = free && (early || !constraint.may_end());
        let mut banned = if open { self.ends.clone() } else { Vec::new() };
        for _ in 0..ATTEMPTS {
            let Ok(sampled) = self.sampler.sample(logits, allowed, &banned) else {
                break;
            };
            let ends = free && self.ends.contains(&sampled.token);
            if ends || constraint.take(sampled.token, left) {
                return Ok(sampled);
            }
            banned.push(sampled.token);
        }
        self.cut_short = true;
        match constraint.close(left) {
            Some(token) => Ok(self.sampler.certain(token)),
            None => Err(Error::Internal(
                "the grammar allows no token, and no end".into(),
            )),
        }
    }

    /// Take a token: its text, and the end of the request if it is one. `last`: no forced one follows.
    fn push(&mut self, sampled: Sampled, last: bool) -> Delta {
        let token = sampled.token;
        self.first_token.get_or_insert_with(Instant::now);
        self.sampler.accept(token);
        self.ids.push(token);

        let (text, mut finish_reason) = self.text_of(token, last);
        let mut delta = Delta {
            token_ids: vec![token],
            logprobs: logprob_of(sampled).into_iter().collect(),
            ..Delta::default()
        };
        self.read(text, finish_reason.is_some(), &mut delta);
        if finish_reason == Some(FinishReason::Stop) {
            finish_reason = Some(self.how_it_stopped());
        }
        delta.usage = finish_reason.map(|_| self.usage());
        delta.finish_reason = finish_reason;
        delta
    }

    /// Sort new text into text, thoughts and calls.
    fn read(&mut self, text: String, last: bool, delta: &mut Delta) {
        let Some(parser) = &mut self.parser else {
            delta.text = text;
            return;
        };
        // A token that completes no character yet, or may be the closing mark, is of the thought it stands in. An end
        // token is of none.
        let inside = parser.in_thought();
        let mut parts = vec![parser.push(&text)];
        let thought = (inside && parser.in_thought() && !(last && text.is_empty()))
            || !parts[0].reasoning.is_empty();
        self.reasoning_tokens += usize::from(thought);
        if last {
            parts.push(parser.finish());
        }
        for part in parts {
            delta.append(Delta {
                text: part.text,
                reasoning: part.reasoning,
                tool_calls: part.calls,
                ..Delta::default()
            });
        }
    }

    fn how_it_stopped(&self) -> FinishReason {
        if self.cut_short {
            return FinishReason::Length;
        }
        match self.parser.as_ref().is_some_and(Parser::called) {
            true => FinishReason::ToolCalls,
            false => FinishReason::Stop,
        }
    }

    /// The text a token releases, and whether it ends the request. End tokens have none.
    fn text_of(&mut self, token: u32, last: bool) -> (String, Option<FinishReason>) {
        let bound = self.constraint.as_ref().is_some_and(|c| !c.free());
        let complete = last && self.constraint.as_ref().is_some_and(Constraint::complete);
        // Within a grammar an end token is a part of the text, until the text is complete.
        if self.ends.contains(&token) && (!bound || complete) {
            return (self.flush(String::new()), Some(FinishReason::Stop));
        }
        let piece = self.text.push(token);
        // Within a grammar no stop counts, nor before min_tokens: nothing is held back for one.
        let (text, hit) = if bound {
            (self.stop.finish() + &piece, None)
        } else if self.completion_tokens() < self.min_tokens {
            (piece, None)
        } else {
            let released = self.stop.push(&piece);
            (released.text, released.hit)
        };
        if hit.is_some() {
            return (text, Some(FinishReason::Stop));
        }
        if complete {
            return (self.flush(text), Some(FinishReason::Stop));
        }
        if self.ids.len() < self.limit {
            return (text, None);
        }
        (self.flush(text), Some(FinishReason::Length))
    }

    /// Append all text held back; a stop completed by it still cuts.
    fn flush(&mut self, mut text: String) -> String {
        let last = self.text.finish();
        let released = self.stop.push(&last);
        text += &released.text;
        text += &self.stop.finish();
        text
    }

    fn usage(&self) -> Usage {
        let now = Instant::now();
        Usage {
            prompt_tokens: self.prompt,
            completion_tokens: self.completion_tokens(),
            reasoning_tokens: self
                .parser
                .as_ref()
                .filter(|parser| parser.splits_thoughts())
                .map(|_| self.reasoning_tokens),
            time_to_first_token: self.first_token.unwrap_or(now) - self.submitted,
            total_time: now - self.submitted,
        }
    }
}

fn logprob_of(sampled: Sampled) -> Option<TokenLogprob> {
    Some(TokenLogprob {
        token: sampled.token,
        logprob: sampled.logprob?,
        top: sampled.top,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token 10 + n is the n-th letter; 99 is half a character that the next token completes.
    #[derive(Default)]
    struct Letters {
        half: bool,
    }

    impl Text for Letters {
        fn push(&mut self, id: u32) -> String {
            if id == 99 {
                self.half = true;
                return String::new();
            }
            let letter = char::from(b'a' + (id.saturating_sub(10) % 26) as u8);
            match std::mem::take(&mut self.half) {
                true => format!("é{letter}"),
                false => letter.to_string(),
            }
        }

        fn finish(&mut self) -> String {
            if std::mem::take(&mut self.half) {
                "\u{FFFD}".into()
            } else {
                String::new()
            }
        }
    }

    const EOS: [u32; 2] = [0, 1];

    fn sequence(options: Options) -> Sequence {
        Sequence::new(
            vec![10, 11, 12],
            &options,
            &EOS,
            (Box::new(Letters::default()) as Box<dyn Text>).into(),
            100,
        )
    }

    /// Logits whose likeliest token is `token`, the second `other`.
    fn row(token: u32, other: u32) -> Vec<f32> {
        let mut row = vec![0.0; 128];
        row[other as usize] = 5.0;
        row[token as usize] = 9.0;
        row
    }

    /// Decode these tokens until the request ends; the text of each delta, and the last delta.
    fn decode(sequence: &mut Sequence, tokens: &[u32]) -> (Vec<String>, Delta) {
        let mut texts = Vec::new();
        for token in tokens {
            let delta = sequence.advance(&row(*token, 40)).unwrap();
            texts.push(delta.text.clone());
            if delta.finish_reason.is_some() {
                return (texts, delta);
            }
        }
        (texts, Delta::default())
    }

    #[test]
    fn any_of_the_end_tokens_ends_the_text_and_shows_no_text() {
        for eos in EOS {
            let (texts, last) = decode(&mut sequence(Options::default()), &[10, 11, eos, 12]);
            assert_eq!(texts, ["a", "b", ""]);
            assert_eq!(last.finish_reason, Some(FinishReason::Stop));
            assert_eq!(last.token_ids, [eos]);
            let usage = last.usage.unwrap();
            assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 3));
            assert!(usage.time_to_first_token <= usage.total_time);
        }
    }

    #[test]
    fn the_tokens_of_a_thought_are_counted() {
        /// Token n is the n-th word.
        struct Words;
        impl Text for Words {
            fn push(&mut self, id: u32) -> String {
                ["", "", "<think>", "</think>", "hm", "</", "yes", "x>"][id as usize].into()
            }
            fn finish(&mut self) -> String {
                String::new()
            }
        }
        let run = |thinking, tokens: &[u32]| {
            let style = crate::response::Style::named("hermes").unwrap();
            let parts = Parts {
                parser: Some(style.parser(&[], true, thinking)),
                ..(Box::new(Words) as Box<dyn Text>).into()
            };
            let mut sequence = Sequence::new(vec![4], &Options::default(), &EOS, parts, 100);
            let (_, last) = decode(&mut sequence, tokens);
            last.usage.unwrap().reasoning_tokens
        };
        use crate::response::Thinking;
        let thought = [2, 4, 5, 7, 4, 3, 6, 6, 0];
        assert_eq!(run(Thinking::Possible, &thought), Some(4));
        assert_eq!(run(Thinking::Begun, &thought[1..]), Some(4));
        assert_eq!(run(Thinking::Begun, &[4, 4, 0]), Some(2));
        assert_eq!(run(Thinking::Possible, &[6, 0]), Some(0));
        assert_eq!(run(Thinking::Off, &thought), None);
    }

    #[test]
    fn own_end_tokens_end_it_and_ignored_ones_do_not() {
        let options = Options {
            ignore_eos: true,
            stop_token_ids: vec![30],
            ..Options::default()
        };
        let (texts, last) = decode(&mut sequence(options), &[10, 0, 11, 30]);
        assert_eq!(texts.len(), 4);
        assert_eq!(last.finish_reason, Some(FinishReason::Stop));
    }

    #[test]
    fn max_tokens_and_the_context_end_it_by_length() {
        let options = Options {
            max_tokens: Some(2),
            ..Options::default()
        };
        let (texts, last) = decode(&mut sequence(options), &[10, 11, 12]);
        assert_eq!(
            (texts.len(), last.finish_reason),
            (2, Some(FinishReason::Length))
        );
        let (texts, last) = decode(&mut sequence(Options::default()), &[10; 200]);
        assert_eq!(
            (texts.len(), last.finish_reason),
            (97, Some(FinishReason::Length))
        );
    }

    #[test]
    fn a_stop_string_ends_it_and_never_shows() {
        let options = Options {
            stop: vec!["cd".into()],
            ..Options::default()
        };
        let (texts, last) = decode(&mut sequence(options), &[10, 12, 11, 12, 13, 14]);
        assert_eq!(texts, ["a", "", "cb", "", ""]);
        assert_eq!(last.finish_reason, Some(FinishReason::Stop));
        assert_eq!(last.usage.unwrap().completion_tokens, 5);
    }

    #[test]
    fn what_was_held_back_comes_with_the_end() {
        let options = Options {
            stop: vec!["ab".into()],
            max_tokens: Some(2),
            ..Options::default()
        };
        let (texts, _) = decode(&mut sequence(options.clone()), &[11, 10]);
        assert_eq!(texts, ["b", "a"]);
        let (texts, _) = decode(&mut sequence(options), &[10, 99]);
        assert_eq!(texts, ["", "a\u{FFFD}"]);
    }

    #[test]
    fn half_a_character_waits_for_the_other_half() {
        let (texts, _) = decode(&mut sequence(Options::default()), &[99, 10]);
        assert_eq!(texts, ["", "éa"]);
    }

    #[test]
    fn nothing_ends_it_before_min_tokens() {
        let options = Options {
            min_tokens: 3,
            stop: vec!["a".into()],
            ..Options::default()
        };
        let (texts, last) = decode(&mut sequence(options), &[0, 10, 0, 0]);
        // The end token is passed over for the second likeliest, 40, which reads "e".
        assert_eq!(texts, ["e", "a", "e", ""]);
        assert_eq!(last.finish_reason, Some(FinishReason::Stop));
    }

    #[test]
    fn logprobs_come_one_per_token_when_asked() {
        let options = Options {
            logprobs: true,
            top_logprobs: 2,
            ..Options::default()
        };
        let delta = sequence(options).advance(&row(10, 40)).unwrap();
        assert_eq!(delta.logprobs.len(), 1);
        assert_eq!(delta.logprobs[0].token, 10);
        assert_eq!(
            delta.logprobs[0]
                .top
                .iter()
                .map(|t| t.0)
                .collect::<Vec<_>>(),
            [10, 40]
        );
        assert!(
            sequence(Options::default())
                .advance(&row(10, 40))
                .unwrap()
                .logprobs
                .is_empty()
        );
    }

    #[test]
    fn the_prompts_logprobs_come_with_the_first_token_and_start_over_with_a_lost_cache() {
        let mut sequence = sequence(Options {
            prompt_logprobs: true,
            top_logprobs: 1,
            ..Options::default()
        });
        assert_eq!((sequence.rows_wanted(2), sequence.rows_wanted(3)), (2, 3));
        assert_eq!(sequence.take(&row(20, 40)).unwrap(), None);
        sequence.forget_cache();
        sequence.ran(3);
        assert_eq!(sequence.take(&row(11, 40)).unwrap(), None);
        assert_eq!(sequence.take(&row(40, 12)).unwrap(), None);
        let delta = sequence.take(&row(20, 40)).unwrap().unwrap();
        assert_eq!((delta.token_ids, delta.logprobs.len()), (vec![20], 0));
        let judged = delta.prompt_logprobs.unwrap();
        let tokens: Vec<(u32, u32)> = judged.iter().map(|j| (j.token, j.top[0].0)).collect();
        assert_eq!(tokens, [(11, 11), (12, 40)]);
        assert_eq!(judged[0].logprob, judged[0].top[0].1);
        assert_eq!(judged[1].logprob, judged[1].top[0].1 - 4.0);
        assert_eq!((sequence.rows_wanted(1), sequence.pending()), (1, 1));
        let next = sequence.take(&row(21, 40)).unwrap().unwrap();
        assert_eq!(next.prompt_logprobs, None);
    }

    fn next(sequence: &Sequence, n: usize) -> (Vec<u32>, usize) {
        let mut tokens = Vec::new();
        let start = sequence.next(n, &mut tokens);
        (tokens, start)
    }

    #[test]
    fn a_lost_cache_runs_prompt_and_output_again() {
        let mut sequence = sequence(Options::default());
        assert!(!sequence.decoding());
        assert_eq!(next(&sequence, 2), (vec![10, 11], 0));
        sequence.ran(3);
        sequence.advance(&row(20, 40)).unwrap();
        assert!(sequence.decoding());
        assert_eq!(next(&sequence, 1), (vec![20], 3));
        sequence.forget_cache();
        assert!(!sequence.decoding());
        assert_eq!(
            (sequence.pending(), next(&sequence, 4).0),
            (4, vec![10, 11, 12, 20])
        );
    }
}
