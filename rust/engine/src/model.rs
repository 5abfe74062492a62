//! A model ready for requests: its file, tokenizer, template and engine, joined. What the door and Rust programs use.

use std::collections::{BTreeMap, HashMap};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use serde_json::{Map, Value, json};

use crate::arch::Arch;
use crate::constraint::{Constraint, Grammars, Rule};
use crate::decoder::Progress;
use crate::device::KvType;
use crate::engine::{Engine, EngineConfig, Request};
use crate::error::{Error, Result};
use crate::memory;
use crate::options::{Defaults, Options, nearest};
use crate::prefix::Beginning;
use crate::recipe::AtLoad;
use crate::response::{Parser, Style, Thinking};
use crate::sequence::{Parts, Text};
use crate::stream::Stream;
use crate::template::{ChatTemplate, RenderRequest, Segment};
use crate::tokenizer::{Detokenizer, Tokenizer};
use crate::weights::{Value as MetadataValue, Weights};
use crate::{files, vocab};

mod answer;
pub mod embed;
mod load;
mod turn;

pub use turn::Turn;

use answer::Answer;
use load::{Adapt, Draft, MemoryPlan, Source, plan_memory};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Own kernels: quantised weights as they are, 8-bit activations, an f16 cache.
    Cpu,
    /// candle in f32, for comparison: slow, exact, large.
    Reference,
}

impl FromStr for DeviceKind {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "reference" => Ok(Self::Reference),
            _ => Err(Error::Unsupported {
                what: "device",
                name: name.to_string(),
                supported: "cpu, reference".to_string(),
            }),
        }
    }
}

/// The type of the cache's numbers that is called so.
///
/// # Errors
/// When none is.
pub fn kv_cache_dtype(name: &str) -> Result<KvType> {
    let known = KvType::NAMES.iter().find(|(known, _)| *known == name);
    known.map(|(_, kv_type)| *kv_type).ok_or_else(|| {
        let names = KvType::NAMES.map(|(name, _)| name).join(", ");
        Error::InvalidRequest(format!(
            "kv_cache_dtype must be one of {names}, got {name:?}"
        ))
    })
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    pub device: DeviceKind,
    /// Tokens of prompt and output together; none: what the model was made for, or what memory holds.
    pub context_size: Option<usize>,
    /// None: the CPUs that this process may use.
    pub threads: Option<usize>,
    /// A template to use in place of the model's.
    pub chat_template: Option<String>,
    /// Memory for keys and values; none: a quarter of what is free once the weights are in, and never more than
    /// `max_sequences` whole contexts need. It is taken from the system as it is first used.
    pub kv_cache_bytes: Option<u64>,
    /// What the CPU keeps keys and values as; the reference keeps f32 and takes no other wish than the default.
    pub kv_cache_dtype: KvType,
    /// Requests that run at a time.
    pub max_sequences: usize,
    /// Whether tokens that a grammar forces run together, not one by one. Off only to compare.
    pub forced_tokens: bool,
    /// See `EngineConfig`.
    pub prefix_cache: bool,
    pub speculation: bool,
    /// A smaller model of the same vocabulary that guesses for this one.
    pub draft_model: Option<PathBuf>,
    /// Directories of LoRA adapters, under the names by which requests ask for them. See [`Model::submit`].
    pub adapters: Vec<(String, PathBuf)>,
    /// What a model in F32, F16 or BF16 is quantised to while it is loaded.
    pub quantization: Option<AtLoad>,
    /// The file that keeps what it was quantised to, for the next time. Its name is the key of what it holds: whoever gives
    /// it says by it which weights these are, and how they are quantised.
    pub quantization_cache: Option<PathBuf>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            device: DeviceKind::Cpu,
            context_size: None,
            threads: None,
            chat_template: None,
            kv_cache_bytes: None,
            kv_cache_dtype: KvType::default(),
            max_sequences: 32,
            forced_tokens: true,
            prefix_cache: true,
            speculation: true,
            draft_model: None,
            adapters: Vec::new(),
            quantization: None,
            quantization_cache: None,
        }
    }
}

/// The adapters of a model, which loads those that requests name by their path.
struct Adapters {
    adapt: Adapt,
    known: Mutex<Vec<(String, u32)>>,
}

impl Adapters {
    /// The number of the adapter of this name, or in this directory.
    fn number(&self, name: &str) -> Result<u32> {
        // Held while one is loaded: who wants the same waits for it.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, number)) = known.iter().find(|(other, _)| other == name) {
            return Ok(*number);
        }
        if !Path::new(name)
            .join(crate::safetensors::ADAPTER_CONFIG)
            .exists()
        {
            let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
            let near = nearest(name, &names);
            let hint = near.map_or(String::new(), |near| format!("; did you mean {near:?}?"));
            return Err(Error::InvalidRequest(format!(
                "adapter must be one of {names:?} or the directory of one, got {name:?}{hint}"
            )));
        }
        self.load(name, Path::new(name), &mut known)
    }

    fn load(&self, name: &str, dir: &Path, known: &mut Vec<(String, u32)>) -> Result<u32> {
        let number = (self.adapt)(dir)?;
        known.push((name.to_string(), number));
        Ok(number)
    }
}

/// What to continue.
pub enum Prompt {
    /// OpenAI-shaped message dicts, rendered through the chat template.
    Messages(Value),
    Text(String),
    Ids(Vec<u32>),
}

/// A model in memory and the thread that runs its requests together.
///
/// # Example
/// ```no_run
/// use hfcore_engine::model::{Model, ModelOptions, Prompt};
/// # fn main() -> hfcore_engine::error::Result<()> {
/// let model = Model::open("model.gguf".as_ref(), &ModelOptions::default(), &|_, _| true)?;
/// let question = serde_json::json!([{"role": "user", "content": "What is a lighthouse?"}]);
/// let stream = model.submit(Prompt::Messages(question), serde_json::json!({"max_tokens": 64}))?;
/// for delta in stream {
///     print!("{}", delta?.text);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Model {
    tokenizer: Arc<Tokenizer>,
    templates: BTreeMap<String, Arc<ChatTemplate>>,
    /// How the checkpoint's response template says that calls are written.
    response_style: Option<&'static Style>,
    defaults: Defaults,
    eos_ids: Vec<u32>,
    original_context: Option<usize>,
    vocab_size: usize,
    forced_tokens: bool,
    /// Made when the first request needs one.
    grammars: OnceLock<Result<Arc<Grammars>>>,
    engine: Engine,
    adapters: Adapters,
    releases: Vec<Box<dyn Fn() + Send + Sync>>,
    info: Value,
    name: String,
}

impl Text for Detokenizer {
    fn push(&mut self, id: u32) -> String {
        Detokenizer::push(self, id)
    }
    fn finish(&mut self) -> String {
        Detokenizer::finish(self)
    }
}

impl Model {
    /// Load the model at `path`: a `.gguf` file or a directory. `progress(done, total)` is told in
    /// bytes; false stops the loading with `Closed`.
    ///
    /// # Errors
    /// `ModelFile`, `Unsupported`, `OutOfMemory` (said before anything is loaded), `Template` for a broken template,
    /// `InvalidRequest` for impossible options.
    pub fn open(path: &Path, options: &ModelOptions, progress: Progress) -> Result<Self> {
        check_options(options)?;
        let mut weights = files::open(path)?;
        let vocabulary = weights.take_metadata("tokenizer.");
        let arch = Arch::read(&weights)?;
        let weights = Arc::new(weights);
        let defaults = defaults(&weights)?;
        let draft = options
            .draft_model
            .as_deref()
            .map(Draft::open)
            .transpose()?;
        let source = Source {
            weights: weights.clone(),
            arch,
            at_load: options.quantization.clone(),
        };
        source.check()?;
        let draft_source = draft.as_ref().map(|draft| &draft.source);
        let plan = plan_memory(&source, draft_source, options, memory::available())?;
        let arch = &source.arch;
        let info = info(path, &weights, arch, options, &plan, &defaults);
        let mut config = EngineConfig::new(arch.vocab_size, plan.context_size, plan.pages);
        config.max_sequences = options.max_sequences;
        config.prefix_cache = options.prefix_cache;
        config.speculation = options.speculation;
        config.token_budget = config.token_budget.max(options.max_sequences);
        let original_context = arch.original_context;
        let vocab_size = arch.vocab_size;
        let pages = plan.pages as usize;
        let dir = weights.config.as_ref().map(|_| path);
        let (texts, loaded) = beside(
            || Texts::read(dir, &vocabulary, options.chat_template.as_deref()),
            |failed| {
                let progress = |done, total| !failed() && progress(done, total);
                source.load(options, pages, &progress)
            },
        );
        drop(vocabulary);
        let Texts {
            tokenizer,
            templates,
            response_style,
        } = texts?;
        let eos_ids = eos_ids(&weights, &defaults, &tokenizer);
        let loaded = loaded?;
        let mut engine = Engine::new(loaded.factory, config)?;
        let adapters = Adapters {
            adapt: loaded.adapt,
            known: Mutex::default(),
        };
        for (name, dir) in &options.adapters {
            let mut known = adapters
                .known
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            adapters.load(name, dir, &mut known)?;
        }
        let mut releases = vec![loaded.release];
        if let Some(draft) = draft {
            draft.check(&tokenizer)?;
            let context = draft.source.arch.context_size;
            let loaded = draft.source.load(options, pages, &|_, _| true)?;
            engine = engine.with_second(loaded.factory, context);
            releases.push(loaded.release);
        }
        Ok(Self {
            tokenizer,
            templates,
            response_style,
            defaults,
            eos_ids,
            original_context,
            vocab_size,
            forced_tokens: options.forced_tokens,
            grammars: OnceLock::new(),
            engine,
            adapters,
            releases,
            info,
            name: path.display().to_string(),
        })
    }

    /// Queue a request. `options` are those of [`Options::parse`]; those that say what the text must be: `regex`, `choice`,
    /// `grammar` (Lark), `response_format`; and for messages also `tools`, `tool_choice`, `parallel_tool_calls`,
    /// `tool_style`, `reasoning`, `parse_special_in_content`, `documents`, `add_generation_prompt` (default: true, unless the final message is
    /// continued), `continue_final_message` and `template_variables`.
    ///
    /// `adapter` is a name of [`ModelOptions::adapters`], or the directory of another one, which is loaded now and stays.
    ///
    /// # Errors
    /// At once, whatever can be known without running: options, template, grammar, context, adapter.
    pub fn submit(&self, prompt: Prompt, options: Value) -> Result<Stream> {
        let (mut for_template, mut options) = split_options(options)?;
        let answer = Answer::take(&mut options)?;
        let options = Options::parse(&Value::Object(options), &self.defaults)?;
        let chat = matches!(prompt, Prompt::Messages(_));
        let template = self
            .template_for(!answer.tools.is_empty())
            .ok()
            .filter(|_| chat);
        let style = answer.style(self.style(template));
        let (ids, thinking) = match prompt {
            Prompt::Messages(messages) => {
                refuse(
                    "add_special_tokens",
                    options.add_special_tokens.is_some(),
                    "text prompts",
                )?;
                if answer.tools.is_empty() {
                    for_template.tools = None;
                }
                self.chat_prompt(for_template, messages, &answer, style)?
            }
            Prompt::Text(text) => {
                for_template.refuse_any()?;
                let special = options.add_special_tokens.unwrap_or(true);
                (self.tokenizer.encode(&text, special)?, Thinking::Off)
            }
            Prompt::Ids(ids) => {
                for_template.refuse_any()?;
                refuse(
                    "add_special_tokens",
                    options.add_special_tokens.is_some(),
                    "text prompts",
                )?;
                (ids, Thinking::Off)
            }
        };
        if !chat {
            refuse("tools", !answer.tools.is_empty(), "messages")?;
            refuse("reasoning", answer.reasoning.is_some(), "messages")?;
        }
        let begun = thinking == Thinking::Begun;
        let rule = match answer.shapes_text() {
            true => answer.rule(style, begun, &self.grammars()?, &options)?,
            false => None,
        };
        if let Some(rule) = &rule {
            self.check_room(rule, ids.len(), &options)?;
        }
        let parser = answer.parser(style, thinking);
        self.engine.submit(Request {
            long: self.is_long(ids.len()),
            adapter: self.adapter(options.adapter.as_deref())?,
            text: self.parts(style, rule, parser, &answer, thinking, &options)?,
            eos_ids: self.eos_ids.clone(),
            ids,
            options,
        })
    }

    fn adapter(&self, name: Option<&str>) -> Result<Option<u32>> {
        name.map(|name| self.adapters.number(name)).transpose()
    }

    /// The prompt's tokens, and what becomes of thoughts after it.
    fn chat_prompt(
        &self,
        for_template: ForTemplate,
        messages: Value,
        answer: &Answer,
        style: &'static Style,
    ) -> Result<(Vec<u32>, Thinking)> {
        let template = self.template_for(for_template.tools.is_some())?;
        let parse_special = for_template.parse_special_in_content;
        let render = |request: &RenderRequest| self.render_segments(request);
        let (text, segments, thinking) =
            chat_text(template, for_template, messages, answer, style, &render)?;
        let ids = self.encode_prompt(&text, &segments, parse_special)?;
        Ok((ids, thinking))
    }

    /// A prompt's tokens. Special and other added tokens are such in what the template wrote; in what came out of messages
    /// they are plain text, unless `parse_special` says otherwise: nobody writes a control token.
    fn encode_prompt(
        &self,
        text: &str,
        segments: &[Segment],
        parse_special: Option<bool>,
    ) -> Result<Vec<u32>> {
        if parse_special == Some(true) {
            return self.tokenizer.encode(text, false);
        }
        let parts: Vec<(&str, bool)> = segments
            .iter()
            .map(|part| (&text[part.text.clone()], part.template))
            .collect();
        match self.tokenizer.encode_segments(&parts) {
            // A pipeline that only the library runs, which knows no parts: it is not asked for.
            Err(Error::Unsupported { .. }) if parse_special.is_none() => {
                self.tokenizer.encode(text, false)
            }
            ids => ids,
        }
    }

    fn grammars(&self) -> Result<Arc<Grammars>> {
        let made = self.grammars.get_or_init(|| {
            let (tokenizer, forced) = (self.tokenizer.clone(), self.forced_tokens);
            Grammars::new(tokenizer, self.vocab_size, &self.eos_ids, forced).map(Arc::new)
        });
        made.clone()
    }

    /// Refuse what cannot end in time.
    fn check_room(&self, rule: &Rule, prompt: usize, options: &Options) -> Result<()> {
        let context = self.engine.config().context().saturating_sub(prompt);
        let room = options.max_tokens.map_or(context, |n| n.min(context));
        let least = rule.least_tokens();
        match least > room {
            false => Ok(()),
            true => Err(Error::InvalidRequest(format!(
                "the shortest text that meets the grammar has {least} tokens, there is room for {room}; raise max_tokens"
            ))),
        }
    }

    /// How each completion's tokens are read.
    fn parts(
        &self,
        style: &'static Style,
        rule: Option<Rule>,
        parser: Option<Parser>,
        answer: &Answer,
        thinking: Thinking,
        options: &Options,
    ) -> Result<Box<dyn Fn() -> Parts + Send>> {
        let (tokenizer, skip) = (self.tokenizer.clone(), options.skip_special_tokens);
        let shown: Vec<u32> = match parser {
            Some(_) => style
                .markers()
                .iter()
                .filter_map(|m| tokenizer.token_to_id(m))
                .collect(),
            None => Vec::new(),
        };
        let tools = answer.tools.clone();
        let parsed = parser.is_some();
        let grammars = rule.is_some().then(|| self.grammars()).transpose()?;
        Ok(Box::new(move || Parts {
            text: Box::new(Detokenizer::new(tokenizer.clone(), skip).showing(shown.clone())),
            constraint: grammars
                .as_ref()
                .zip(rule.as_ref())
                .map(|(grammars, rule)| Constraint::new(grammars.clone(), rule)),
            parser: parsed.then(|| style.parser(&tools, !tools.is_empty(), thinking)),
        }))
    }

    /// How the model writes calls: as its response template says, else as its chat template shows.
    fn style(&self, template: Option<&Arc<ChatTemplate>>) -> &'static Style {
        let known = template.map(|template| (template.source(), template.takes_tools()));
        let (source, takes_tools) = known.unwrap_or_default();
        let shown = Style::of_template(source, takes_tools);
        self.response_style
            .map_or(shown, |style| style.spelled_as(shown))
    }

    /// The prompt that these messages make. A content list of text parts counts as their text.
    ///
    /// # Errors
    /// `NoChatTemplate`; `Template`; `InvalidRequest` for content that is not text.
    pub fn render(&self, request: &RenderRequest) -> Result<String> {
        self.render_segments(request).map(|(text, _)| text)
    }

    /// The same, and which parts of it the template wrote.
    fn render_segments(&self, request: &RenderRequest) -> Result<(String, Vec<Segment>)> {
        let template = self.template_for(request.tools.is_some())?;
        let told;
        let request = if template.takes_tools() {
            request
        } else {
            let style = self.style(Some(template));
            let messages = plain_content(&request.messages)?;
            let messages = messages.as_ref().unwrap_or(&request.messages);
            told = RenderRequest {
                messages: answer::spell_out(
                    messages,
                    request.tools.as_ref(),
                    style,
                    template.source(),
                ),
                tools: None,
                ..request.clone()
            };
            &told
        };
        render_plain(template, request)
    }

    /// The logits after `ids`, `[vocab]`, or after each of them, `[ids, vocab]`; with an adapter, if one is named.
    pub fn logits(&self, ids: &[u32], last_only: bool, adapter: Option<&str>) -> Result<Vec<f32>> {
        let begins = Beginning {
            long: self.is_long(ids.len()),
            adapter: self.adapter(adapter)?,
        };
        self.engine.logits(ids.to_vec(), last_only, begins)
    }

    /// Write what the cache holds of texts that have run to a file; see [`Engine::save_prefixes`]. `identity` tells this
    /// model's files from all others, such as by a hash of them.
    pub fn save_prefixes(&self, path: &Path, identity: &str) -> Result<usize> {
        self.engine.save_prefixes(path, &self.cache_name(identity))
    }

    /// Take into the cache what was saved; see [`Engine::load_prefixes`].
    pub fn load_prefixes(&self, path: &Path, identity: &str) -> Result<usize> {
        self.engine.load_prefixes(path, &self.cache_name(identity))
    }

    fn cache_name(&self, identity: &str) -> String {
        format!("{identity} {}", self.info["kv_cache_dtype"])
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The main template, if there is one.
    pub fn chat_template(&self) -> Option<&Arc<ChatTemplate>> {
        self.templates
            .get("default")
            .or_else(|| self.templates.values().next())
    }

    /// What was loaded, as a JSON object.
    pub fn info(&self) -> Value {
        self.info.clone()
    }

    /// What the engine did so far and does now, as a JSON object of numbers.
    pub fn metrics(&self) -> Value {
        let m = self.engine.metrics();
        json!({
            "requests": m.requests,
            "prompt_tokens": m.prompt_tokens,
            "completion_tokens": m.completion_tokens,
            "steps": m.steps,
            "preemptions": m.preemptions,
            "running": m.running,
            "waiting": m.waiting,
            "pages_used": m.pages_used,
            "pages_total": m.pages_total,
            "pages_cached": m.pages_cached,
            "prefix_lookup_tokens": m.prefix_lookup_tokens,
            "prefix_hit_tokens": m.prefix_hit_tokens,
            "drafted_tokens": m.drafted_tokens,
            "accepted_tokens": m.accepted_tokens,
            "cancelled": m.cancelled,
            "seconds_busy": m.busy.as_secs_f64(),
        })
    }

    /// End every request and let go of the weights. Later requests get `Closed`.
    pub fn close(&self) {
        self.engine.close();
        self.releases.iter().for_each(|release| release());
    }

    fn is_long(&self, tokens: usize) -> bool {
        self.original_context.is_some_and(|n| tokens > n)
    }

    /// Several templates: the one named for tools takes requests with tools, as in transformers.
    fn template_for(&self, tools: bool) -> Result<&Arc<ChatTemplate>> {
        let named = if tools {
            self.templates.get("tool_use")
        } else {
            None
        };
        named
            .or_else(|| self.chat_template())
            .ok_or_else(|| Error::NoChatTemplate {
                model: self.name.clone(),
            })
    }
}

/// What a model reads and writes text with.
struct Texts {
    tokenizer: Arc<Tokenizer>,
    templates: BTreeMap<String, Arc<ChatTemplate>>,
    response_style: Option<&'static Style>,
}

impl Texts {
    /// From the directory `dir`, or else from a GGUF file's `vocabulary`.
    fn read(
        dir: Option<&Path>,
        vocabulary: &HashMap<String, MetadataValue>,
        chat_template: Option<&str>,
    ) -> Result<Self> {
        let tokenizer = Arc::new(match dir {
            Some(dir) => Tokenizer::from_dir(dir)?,
            None => vocab::tokenizer(vocabulary)?,
        });
        // Whoever gives another chat template leaves the checkpoint's own way of writing calls.
        let response_style = match chat_template {
            Some(_) => None,
            None => tokenizer
                .response_template()
                .and_then(Style::of_response_template),
        };
        Ok(Self {
            templates: templates(&tokenizer, chat_template)?,
            tokenizer,
            response_style,
        })
    }
}

/// Run `first` on a thread of its own and `second` here; `second` may ask whether `first` has failed already.
fn beside<A: Send, B>(
    first: impl FnOnce() -> Result<A> + Send,
    second: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> B,
) -> (Result<A>, B) {
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            let result = first();
            failed.store(result.is_err(), Relaxed);
            result
        });
        let second = second(&|| failed.load(Relaxed));
        let first = first.join().unwrap_or_else(|panic| resume_unwind(panic));
        (first, second)
    })
}

fn check_options(options: &ModelOptions) -> Result<()> {
    let at_least_one = |name: &str, value: Option<usize>| match value {
        Some(0) => Err(Error::InvalidRequest(format!(
            "{name} must be at least 1, got 0"
        ))),
        _ => Ok(()),
    };
    at_least_one("threads", options.threads)?;
    at_least_one("context_size", options.context_size)?;
    at_least_one("max_sequences", Some(options.max_sequences))?;
    if options.draft_model.is_some() && !options.speculation {
        return Err(Error::InvalidRequest(
            "draft_model would do nothing: speculation is off".to_string(),
        ));
    }
    hfcore_kernels::simd::Isa::forced().map_err(Error::InvalidRequest)?;
    if options.device == DeviceKind::Reference && options.kv_cache_dtype != KvType::default() {
        return Err(Error::InvalidRequest(
            "kv_cache_dtype must be f16 on the reference device, which keeps f32, got int8"
                .to_string(),
        ));
    }
    match options.threads {
        Some(n) if n > 1024 => Err(Error::InvalidRequest(format!(
            "threads must be at most 1024, got {n}"
        ))),
        _ => Ok(()),
    }
}

fn templates(
    tokenizer: &Tokenizer,
    given: Option<&str>,
) -> Result<BTreeMap<String, Arc<ChatTemplate>>> {
    let special = tokenizer.special_tokens();
    let make = |name: &str, source: &str| {
        Ok((
            name.to_string(),
            Arc::new(ChatTemplate::new(name, source, special)?),
        ))
    };
    match given {
        Some(source) => Ok(BTreeMap::from([make("default", source)?])),
        None => tokenizer
            .chat_templates()
            .iter()
            .map(|(name, source)| make(name, source))
            .collect(),
    }
}

/// The model's own generation defaults: `generation_config.json`, or what a GGUF file says of sampling.
fn defaults(weights: &Weights) -> Result<Defaults> {
    if let Some(config) = &weights.generation_config {
        return Defaults::from_generation_config(config);
    }
    let mut config = Map::new();
    for (theirs, ours) in [
        ("temp", "temperature"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("penalty_repeat", "repetition_penalty"),
    ] {
        if let Some(x) = weights.get_f32(&format!("general.sampling.{theirs}"))? {
            config.insert(ours.into(), json!(x));
        }
    }
    if let Some(k) = weights.get_usize("general.sampling.top_k")? {
        config.insert("top_k".into(), json!(k));
    }
    if !config.is_empty() {
        config.insert("do_sample".into(), json!(true));
    }
    Defaults::from_generation_config(&Value::Object(config))
}

/// The end tokens: `generation_config.json`'s, else `config.json`'s, else the tokenizer's.
fn eos_ids(weights: &Weights, defaults: &Defaults, tokenizer: &Tokenizer) -> Vec<u32> {
    if !defaults.eos_token_ids.is_empty() {
        return defaults.eos_token_ids.clone();
    }
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let config = weights.config.as_ref().and_then(|c| c.get("eos_token_id"));
    let ids: Vec<u32> = match config {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    };
    if ids.is_empty() {
        tokenizer.eos_ids().to_vec()
    } else {
        ids
    }
}

fn info(
    path: &Path,
    weights: &Weights,
    arch: &Arch,
    options: &ModelOptions,
    plan: &MemoryPlan,
    defaults: &Defaults,
) -> Value {
    let mut bytes: BTreeMap<&str, u64> = BTreeMap::new();
    let mut parameters = 0u64;
    for tensor in weights.tensors.values() {
        *bytes.entry(tensor.tensor_type.name()).or_default() += tensor.bytes.len() as u64;
        parameters += tensor.shape.iter().product::<usize>() as u64;
    }
    for matrix in weights.quantised.values() {
        *bytes.entry(matrix.kind).or_default() += matrix.bytes() as u64;
        parameters += matrix.elements() as u64;
    }
    let main_type = bytes.iter().max_by_key(|(_, n)| **n).map(|(name, _)| *name);
    let name = weights
        .get_str("general.name")
        .ok()
        .flatten()
        .map(str::to_string);
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
    json!({
        "path": path.display().to_string(),
        "name": name.or(stem),
        "architecture": arch.family,
        "vocab_size": arch.vocab_size,
        "context_size": plan.context_size,
        "trained_context_size": arch.context_size,
        "layers": arch.layers.len(),
        "hidden_size": arch.hidden_size,
        "quantization": options.quantization.as_ref().map_or(main_type, |q| Some(q.recipe.name)),
        "parameters": parameters,
        "bytes": weights.total_bytes(),
        "adapters": options.adapters.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        "draft_model": options.draft_model.as_ref().map(|path| path.display().to_string()),
        "kv_cache_bytes": plan.kv_cache_bytes,
        "kv_cache_dtype": match (options.device, options.kv_cache_dtype) {
            (DeviceKind::Reference, _) => "f32",
            (DeviceKind::Cpu, KvType::F16) => "f16",
            (DeviceKind::Cpu, KvType::Int8) => "int8",
        },
        "device": match options.device { DeviceKind::Cpu => "cpu", DeviceKind::Reference => "reference" },
        "instruction_set": hfcore_kernels::simd::Isa::detect().name(),
        "threads": options.threads.unwrap_or_else(hfcore_kernels::pool::Pool::available),
        "file_identity": identity(path),
        "generation_defaults": {
            "do_sample": defaults.do_sample,
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "typical_p": defaults.typical_p,
            "repetition_penalty": defaults.repetition_penalty,
            "max_tokens": defaults.max_tokens,
        },
    })
}

/// Size and time of change of the model's file: tells one version from another without reading it.
fn identity(path: &Path) -> Option<String> {
    let meta = std::fs::metadata(path).ok()?;
    let changed = meta
        .modified()
        .ok()?
        .duration_since(std::time::UNIX_EPOCH)
        .ok()?;
    Some(format!("{}-{}", meta.len(), changed.as_nanos()))
}

// ------------------------------------------------------------------------------------- options of the template

/// The part of a request's options that the template takes.
#[derive(Default)]
struct ForTemplate {
    tools: Option<Value>,
    documents: Option<Value>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    /// See `Model::encode_prompt`.
    parse_special_in_content: Option<bool>,
    variables: Option<Map<String, Value>>,
}

fn split_options(options: Value) -> Result<(ForTemplate, Map<String, Value>)> {
    let Value::Object(mut options) = options else {
        return Err(Error::InvalidRequest(format!(
            "options should be an object, got {options}"
        )));
    };
    let tools = options.get("tools").filter(|v| !v.is_null()).cloned();
    let mut take = |key: &str| options.remove(key).filter(|v| !v.is_null());
    let flag = |key: &str, value: Option<Value>| match value {
        None => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(b)),
        Some(other) => Err(Error::InvalidRequest(format!(
            "{key} should be true or false, got {other}"
        ))),
    };
    let for_template = ForTemplate {
        tools,
        documents: take("documents"),
        add_generation_prompt: flag("add_generation_prompt", take("add_generation_prompt"))?,
        continue_final_message: flag("continue_final_message", take("continue_final_message"))?,
        parse_special_in_content: flag(
            "parse_special_in_content",
            take("parse_special_in_content"),
        )?,
        variables: match take("template_variables") {
            None => None,
            Some(Value::Object(variables)) => Some(variables),
            Some(other) => {
                return Err(Error::InvalidRequest(format!(
                    "template_variables should be an object, got {other}"
                )));
            }
        },
    };
    Ok((for_template, options))
}

impl ForTemplate {
    fn request(self, messages: Value) -> Result<RenderRequest> {
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        Ok(RenderRequest {
            messages,
            tools: self.tools,
            documents: self.documents,
            add_generation_prompt: self
                .add_generation_prompt
                .unwrap_or(!continue_final_message),
            continue_final_message,
            variables: self.variables.unwrap_or_default(),
            ..RenderRequest::default()
        })
    }

    /// Set the template's switch for thoughts, under the names that templates have for it.
    fn switch_thoughts(&mut self, wanted: bool, source: &str) -> Result<()> {
        let names = ["enable_thinking", "thinking"];
        if !names.iter().any(|name| source.contains(name)) {
            return Err(Error::InvalidRequest(format!(
                "reasoning {wanted} would do nothing: the chat template has no switch for thoughts"
            )));
        }
        let variables = self.variables.get_or_insert_with(Map::new);
        for name in names {
            variables.entry(name).or_insert(Value::Bool(wanted));
        }
        Ok(())
    }

    fn refuse_any(&self) -> Result<()> {
        refuse("tools", self.tools.is_some(), "messages")?;
        refuse("documents", self.documents.is_some(), "messages")?;
        refuse(
            "add_generation_prompt",
            self.add_generation_prompt.is_some(),
            "messages",
        )?;
        refuse(
            "continue_final_message",
            self.continue_final_message.is_some(),
            "messages",
        )?;
        refuse(
            "parse_special_in_content",
            self.parse_special_in_content.is_some(),
            "messages",
        )?;
        refuse("template_variables", self.variables.is_some(), "messages")
    }
}

/// A template's rendering: the text, and its parts.
type Render<'a> = dyn Fn(&RenderRequest) -> Result<(String, Vec<Segment>)> + 'a;

/// A template alone would take a message without a role for one of a role that it does not know.
fn check_roles(messages: &Value) -> Result<()> {
    let all = messages.as_array().map_or(&[][..], Vec::as_slice);
    for (i, message) in all.iter().enumerate() {
        if let Value::Object(message) = message
            && !message.get("role").is_some_and(Value::is_string)
        {
            let keys: Vec<_> = message.keys().collect();
            return Err(Error::InvalidRequest(format!(
                "message {i} must have a role, got keys {keys:?}"
            )));
        }
    }
    Ok(())
}

/// A prompt's text, its parts, and what becomes of thoughts after it; `render` is the template's.
fn chat_text(
    template: &ChatTemplate,
    mut for_template: ForTemplate,
    messages: Value,
    answer: &Answer,
    style: &'static Style,
    render: &Render,
) -> Result<(String, Vec<Segment>, Thinking)> {
    if let Some(wanted) = answer.reasoning {
        for_template.switch_thoughts(wanted, template.source())?;
    }
    check_roles(&messages)?;
    let messages = match template.takes_tools() {
        true => messages,
        false => answer::spell_out(
            &messages,
            for_template.tools.take().as_ref(),
            style,
            template.source(),
        ),
    };
    let request = for_template.request(messages)?;
    let (mut text, mut segments) = render(&request)?;
    let Some((open, close)) = style.thought() else {
        return Ok((text, segments, Thinking::Off));
    };
    let begun = text.trim_end().ends_with(open);
    if answer.reasoning == Some(true)
        && !begun
        && answer.shapes_text()
        && request.add_generation_prompt
    {
        let start = text.len();
        text.push_str(open);
        text.push('\n');
        segments.push(Segment {
            text: start..text.len(),
            template: true,
        });
        return Ok((text, segments, Thinking::Begun));
    }
    let thinking = match (begun, template.source().contains(close)) {
        (true, _) => Thinking::Begun,
        (false, true) => Thinking::Possible,
        (false, false) => Thinking::Off,
    };
    Ok((text, segments, thinking))
}

/// Render messages whose content is text, or lists of it.
fn render_plain(
    template: &ChatTemplate,
    request: &RenderRequest,
) -> Result<(String, Vec<Segment>)> {
    match plain_content(&request.messages)? {
        Some(messages) => template.render_segments(&RenderRequest {
            messages,
            ..request.clone()
        }),
        None => template.render_segments(request),
    }
}

/// An option that would do nothing is refused.
fn refuse(name: &str, given: bool, only_for: &str) -> Result<()> {
    match given {
        true => Err(Error::InvalidRequest(format!(
            "{name} applies to {only_for} only"
        ))),
        false => Ok(()),
    }
}

/// Messages whose content lists are joined to text; `None` when there is no such list. Anything but text is refused: a
/// template of a text model would print it into the prompt.
fn plain_content(messages: &Value) -> Result<Option<Value>> {
    let is_list = |m: &Value| m.get("content").is_some_and(Value::is_array);
    let Some(list) = messages.as_array().filter(|list| list.iter().any(is_list)) else {
        return Ok(None);
    };
    let mut list = list.clone();
    for message in list.iter_mut().filter(|m| is_list(m)) {
        let mut text = String::new();
        for part in message["content"].as_array().into_iter().flatten() {
            match (
                part,
                part.get("type").and_then(Value::as_str),
                part.get("text"),
            ) {
                (Value::String(s), ..) => text.push_str(s),
                (_, Some("text"), Some(Value::String(s))) => text.push_str(s),
                (_, kind, _) => {
                    let kind = kind.unwrap_or("without a type");
                    return Err(Error::InvalidRequest(format!(
                        "this model takes text only, got a content part {kind:?}"
                    )));
                }
            }
        }
        message["content"] = Value::String(text);
    }
    Ok(Some(Value::Array(list)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_parts_are_joined_and_images_refused() {
        let text = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        assert_eq!(plain_content(&text).unwrap().unwrap()[0]["content"], "ab");
        assert!(
            plain_content(&json!([{"role": "user", "content": "x"}]))
                .unwrap()
                .is_none()
        );
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        let error = plain_content(&image).unwrap_err().to_string();
        assert!(
            error.contains("text only") && error.contains("image_url"),
            "{error}"
        );
    }

    #[test]
    fn what_a_prompt_cannot_use_is_refused() {
        let (for_template, rest) =
            split_options(json!({"tools": [], "max_tokens": 3, "documents": null})).unwrap();
        assert_eq!(
            rest,
            *json!({"max_tokens": 3, "tools": []}).as_object().unwrap()
        );
        let error = for_template.refuse_any().unwrap_err().to_string();
        assert_eq!(error, "tools applies to messages only");
    }

    #[test]
    fn the_final_message_is_continued_without_a_generation_prompt() {
        let (for_template, _) = split_options(json!({"continue_final_message": true})).unwrap();
        let request = for_template.request(json!([])).unwrap();
        assert!(request.continue_final_message && !request.add_generation_prompt);
    }
}
