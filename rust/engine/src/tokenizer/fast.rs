//! The way from text to ids that holds no normalised strings, offsets or tokens: parts between added tokens,
//! words of them, and for a word its ids, mostly remembered from the last time.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

use super::added::{Added, Finder, Part};
use super::model::{Model, Work};
use super::normal::Normal;
use super::split::{Cuts, Splitter, Stage, each_word, is_seam};
use super::table::Seed;
use super::words::width;

/// Buffers kept for the threads that encode next.
const MAX_IDLE: usize = 32;
/// A word's bytes that are kept with its ids: with their length they are one 128-bit number.
const KEY_BYTES: usize = 15;
const ENTRY_IDS: usize = 4;
/// Words remembered at first and at most by one thread; an entry has 32 bytes.
const MIN_ENTRIES: usize = 1 << 10;
const MAX_ENTRIES: usize = 1 << 18;
/// The same for words that do not fit there, of at most this many bytes; all are forgotten when those kept
/// have more than these in all.
const LONG_WORD: usize = 512;
/// Places that a longer word may have.
const WAYS: usize = 4;
const LONG_BYTES: usize = 4 << 20;
const MAX_LONG_ENTRIES: usize = 1 << 17;
/// Words that are looked up side by side, so that they wait for memory together.
const BATCH: usize = 16;
/// Stretches of words are remembered as a whole: conversations come again with each turn. They are cut at the
/// first seam behind so many bytes, and left alone when longer than `LONG_WORD`.
const STRETCH: usize = 64;
const STRETCH_BYTES: usize = 8 << 20;

/// The fast pipeline of a tokenizer.
#[derive(Debug)]
pub(super) struct Fast {
    plain: Option<Finder>,
    normalized: Option<Finder>,
    splitter: Splitter,
    /// Of stages: by the ASCII character before a place, a bit for each behind it between which there is a seam.
    seams: Vec<u128>,
    cuts: Option<Cuts>,
    idle: Mutex<Vec<Scratch>>,
}

/// What a call to encode is given beside the text.
pub(super) struct Request<'a> {
    pub model: &'a Model,
    pub normal: &'a Normal,
    pub added: &'a Added,
    /// Where tokens may be looked for; nothing: everywhere.
    pub trusted: Option<&'a dyn Fn(usize, usize) -> bool>,
    /// No more ids than these are wanted.
    pub limit: usize,
}

#[derive(Debug)]
struct Scratch {
    cache: Cache,
    long: LongCache,
    stretches: LongCache,
    work: Work,
    text: String,
}

impl Fast {
    /// `None` where the pipeline holds something that is not done here.
    pub fn new(model: &Model, normal: &Normal, splitter: Splitter, added: &Added) -> Option<Self> {
        let (plain, normalized) = added.finders()?;
        let cuts = match (&splitter, model) {
            (_, Model::Library(_)) => return None,
            (Splitter::Whole, Model::Bpe { model, .. }) => Cuts::new(model, '\u{2581}'),
            (Splitter::Metaspace(meta), Model::Bpe { model, .. }) => {
                if meta.depends_on_place() && !normal.is_canonical() {
                    return None;
                }
                Cuts::new(model, meta.mark())
            }
            (Splitter::Metaspace(meta), _) => {
                if meta.depends_on_place() && !normal.is_canonical() {
                    return None;
                }
                None
            }
            _ => None,
        };
        let seams = match &splitter {
            Splitter::Stages { stages, .. } => ascii_seams(stages),
            _ => Vec::new(),
        };
        Some(Self {
            plain,
            normalized,
            splitter,
            seams,
            cuts,
            idle: Mutex::new(Vec::new()),
        })
    }

    #[cfg(test)]
    pub fn forget(&self) {
        self.idle.lock().unwrap().clear();
    }

    /// Append the ids of `text`. `None` when it holds what the model cannot encode.
    pub fn encode(&self, text: &str, request: &Request<'_>, ids: &mut Vec<u32>) -> Option<()> {
        let taken = self.idle.lock().ok().and_then(|mut idle| idle.pop());
        let mut scratch = taken.unwrap_or_default();
        let done = Encoder {
            fast: self,
            request,
            scratch: &mut scratch,
            ids,
            failed: false,
            changed: false,
            waiting: [(0, 0); BATCH],
            words_waiting: 0,
        }
        .text(text);
        if let Ok(mut idle) = self.idle.lock()
            && idle.len() < MAX_IDLE
        {
            idle.push(scratch);
        }
        done.then_some(())
    }
}

fn ascii_seams(stages: &[Stage]) -> Vec<u128> {
    let behind = |before: u8| {
        let seam = |after: &u8| is_seam(stages, &[before, *after], 1);
        (0..128)
            .filter(seam)
            .fold(0, |bits, after| bits | 1 << after)
    };
    (0..128).map(behind).collect()
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            cache: Cache::new(),
            long: LongCache::new(LONG_BYTES),
            stretches: LongCache::new(STRETCH_BYTES),
            work: Work::default(),
            text: String::new(),
        }
    }
}

struct Encoder<'a> {
    fast: &'a Fast,
    request: &'a Request<'a>,
    scratch: &'a mut Scratch,
    ids: &'a mut Vec<u32>,
    failed: bool,
    /// Words of late have other ids than elsewhere, to avoid control tokens.
    changed: bool,
    /// Starts and ends of words of the text at hand.
    waiting: [(usize, usize); BATCH],
    words_waiting: usize,
}

impl Encoder<'_> {
    fn text(mut self, text: &str) -> bool {
        let fast = self.fast;
        let Some(finder) = &fast.plain else {
            self.normalize(text, 0..text.len());
            return !self.failed;
        };
        let trusted = self.request.trusted;
        let allowed = |start: usize, end: usize, control: bool| {
            !control || trusted.is_none_or(|trusted| trusted(start, end))
        };
        finder.split(text, &allowed, &mut |part| match part {
            Part::Token(id) => self.push(id),
            Part::Text(range) => self.normalize(text, range),
            Part::Broken => self.give_up(),
        });
        !self.failed
    }

    fn push(&mut self, id: u32) -> bool {
        self.ids.push(id);
        self.ids.len() < self.request.limit
    }

    fn give_up(&mut self) -> bool {
        self.failed = true;
        false
    }

    fn normalize(&mut self, text: &str, part: Range<usize>) -> bool {
        let Some(normalized) = self.request.normal.apply(&text[part.clone()]) else {
            self.failed = true;
            return false;
        };
        let (fast, first) = (self.fast, part.start == 0);
        let Some(finder) = &fast.normalized else {
            return self.words(&normalized, first);
        };
        // Where the text stayed as it is, places are known; else all of it must be trusted.
        let trusted = self.request.trusted;
        let same = matches!(normalized, Cow::Borrowed(_));
        let allowed = |start: usize, end: usize, control: bool| {
            !control
                || trusted.is_none_or(|trusted| match same {
                    true => trusted(part.start + start, part.start + end),
                    false => (part.start..part.end).all(|at| trusted(at, at + 1)),
                })
        };
        finder.split(&normalized, &allowed, &mut |part| match part {
            Part::Token(id) => self.push(id),
            Part::Broken => self.give_up(),
            Part::Text(range) => {
                let first = first && range.start == 0;
                self.words(&normalized[range], first)
            }
        })
    }

    fn words(&mut self, text: &str, first: bool) -> bool {
        if text.is_empty() {
            return true;
        }
        let fast = self.fast;
        match &fast.splitter {
            Splitter::Whole => self.pieces(text.as_bytes()),
            Splitter::Metaspace(meta) => {
                let mut marked = std::mem::take(&mut self.scratch.text);
                meta.mark_spaces(text, first, &mut marked);
                let more = match meta.split {
                    true => self.marked(marked.as_bytes(), meta.mark()),
                    false => self.pieces(marked.as_bytes()),
                };
                self.scratch.text = marked;
                more
            }
            Splitter::Stages { stages, space } => {
                if *space && !text.starts_with(' ') {
                    let mut spaced = std::mem::take(&mut self.scratch.text);
                    spaced.clear();
                    spaced.push(' ');
                    spaced.push_str(text);
                    let more = self.staged(stages, spaced.as_bytes());
                    self.scratch.text = spaced;
                    return more;
                }
                self.staged(stages, text.as_bytes())
            }
        }
    }

    /// Words that stages cut.
    fn staged(&mut self, stages: &[Stage], text: &[u8]) -> bool {
        let fast = self.fast;
        let seam = |at: usize| {
            let (before, after) = (text[at - 1], text[at]);
            match fast.seams.get(before as usize) {
                Some(seams) if after < 0x80 => seams >> after & 1 == 1,
                _ => is_seam(stages, text, at),
            }
        };
        self.stretches(text, &seam, &mut |encoder, part, stop| {
            let (from, mut more) = (part.start, true);
            each_word(stages, &text[part], &mut |start, end| {
                let before = from + start < stop;
                debug_assert!(!before || from + end <= stop, "a word across a seam");
                more = !before || encoder.word(text, from + start, from + end);
                before && more
            });
            more
        })
    }

    /// Words that begin with a mark each.
    fn marked(&mut self, text: &[u8], mark: char) -> bool {
        let mut buffer = [0; 4];
        let mark = mark.encode_utf8(&mut buffer).as_bytes();
        let seam = |at: usize| text[at] == mark[0] && text[at..].starts_with(mark);
        self.stretches(text, &seam, &mut |encoder, part, stop| {
            let mut start = part.start;
            while start < stop {
                let mut end = start + width(text[start]);
                while end < stop && !seam(end) {
                    end += 1;
                }
                if !encoder.word(text, start, end) {
                    return false;
                }
                start = end;
            }
            true
        })
    }

    /// A text that is one word, in pieces where that is the same.
    fn pieces(&mut self, text: &[u8]) -> bool {
        let fast = self.fast;
        let Some(cuts) = &fast.cuts else {
            return self.word(text, 0, text.len()) && self.flush(text);
        };
        let seam = |at: usize| cuts.is_seam(text, at);
        self.stretches(text, &seam, &mut |encoder, part, stop| {
            let seen = &text[..part.end];
            let mut start = part.start;
            while start < stop {
                let end = cuts.next(seen, start);
                if !encoder.word(text, start, end) {
                    return false;
                }
                start = end;
            }
            true
        })
    }

    /// Go through `text` in stretches that end at seams. `words` takes the words of one: it may look at the text
    /// of the range, which ends with the first character behind the stretch, and stops at the stretch's end.
    #[inline]
    fn stretches(
        &mut self,
        text: &[u8],
        seam: &impl Fn(usize) -> bool,
        words: &mut dyn FnMut(&mut Self, Range<usize>, usize) -> bool,
    ) -> bool {
        let mut at = 0;
        while at < text.len() {
            let end = next_seam(text, at + STRETCH, seam);
            let seen = text.get(end).map_or(end, |&byte| end + width(byte));
            // The same bytes at a text's end are another stretch.
            let key = &text[at..seen];
            let hash = match key.len() <= LONG_WORD {
                true => Some(self.scratch.stretches.seed.bytes(key) ^ u64::from(seen > end)),
                false => None,
            };
            if !self.known_stretch(hash, key) {
                let before = self.ids.len();
                self.changed = false;
                if !words(self, at..seen, end) || !self.flush(text) {
                    return false;
                }
                if let (Some(hash), false) = (hash, self.changed || self.failed) {
                    let ids = &self.ids[before..];
                    self.scratch.stretches.insert(hash, key, ids);
                }
            }
            if self.ids.len() >= self.request.limit || self.failed {
                return false;
            }
            at = end;
        }
        true
    }

    fn known_stretch(&mut self, hash: Option<u64>, key: &[u8]) -> bool {
        let known = hash.and_then(|hash| self.scratch.stretches.get(hash, key));
        let Some(known) = known.filter(|known| self.may_stand(known)) else {
            return false;
        };
        self.ids.extend_from_slice(known);
        true
    }

    /// Whether these ids of text are no control tokens, where that matters.
    #[inline]
    fn may_stand(&self, ids: &[u32]) -> bool {
        let Request { trusted, added, .. } = self.request;
        trusted.is_none() || !ids.iter().any(|&id| added.is_control(id))
    }

    /// Take a word; it is looked up when there are some, or by [`flush`](Self::flush).
    #[inline]
    fn word(&mut self, text: &[u8], start: usize, end: usize) -> bool {
        let at = self.words_waiting;
        self.waiting[at] = (start, end);
        self.words_waiting = at + 1;
        at + 1 < BATCH || self.flush(text)
    }

    /// Append the ids of the words of `text` that wait.
    fn flush(&mut self, text: &[u8]) -> bool {
        let count = std::mem::take(&mut self.words_waiting);
        let waiting = self.waiting;
        let mut keys = [0; BATCH];
        let mut places = [0; BATCH];
        let mut seen = 0;
        for (at, &(start, end)) in waiting[..count].iter().enumerate() {
            if end - start <= KEY_BYTES {
                keys[at] = key(text, start, end - start);
                places[at] = self.scratch.cache.place(keys[at]);
                seen ^= self.scratch.cache.sets[places[at]].0[0].key as u64;
            } else {
                let hash = self.scratch.long.seed.bytes(&text[start..end]);
                places[at] = hash as usize;
                seen ^= self.scratch.long.at(hash).hash;
            }
        }
        std::hint::black_box(seen);
        for (at, &(start, end)) in waiting[..count].iter().enumerate() {
            let word = &text[start..end];
            let more = match keys[at] {
                0 => self.long_word(word, places[at] as u64),
                key => self.short_word(word, key, places[at]),
            };
            if !more {
                return false;
            }
        }
        true
    }

    #[inline]
    fn short_word(&mut self, word: &[u8], key: u128, place: usize) -> bool {
        let before = self.ids.len();
        // The cache may have grown since the place was found: then this one is not there.
        if let Some(known) = self.scratch.cache.get(key, place) {
            push_known(known, self.ids);
            if self.may_stand(&self.ids[before..]) {
                return self.ids.len() < self.request.limit;
            }
            self.ids.truncate(before);
        }
        let changed = std::mem::take(&mut self.changed);
        let hash = self.scratch.long.seed.bytes(word);
        let more = self.long_word(word, hash);
        if let Some(new) = self.ids.get(before..)
            && !self.failed
            && !self.changed
        {
            self.scratch.cache.insert(key, new);
        }
        self.changed |= changed;
        more
    }

    /// A word that the small cache does not hold.
    fn long_word(&mut self, word: &[u8], hash: u64) -> bool {
        let rememberable = word.len() <= LONG_WORD;
        let known = match rememberable {
            true => self.scratch.long.get(hash, word),
            false => None,
        };
        if let Some(known) = known.filter(|known| self.may_stand(known)) {
            self.ids.extend_from_slice(known);
            return self.ids.len() < self.request.limit;
        }
        let before = self.ids.len();
        let changed = self.encode_word(word);
        if let Some(new) = self.ids.get(before..)
            && rememberable
            && !changed
            && !self.failed
            && (word.len() > KEY_BYTES || new.len() > ENTRY_IDS)
        {
            self.scratch.long.insert(hash, word, new);
        }
        self.changed |= changed;
        self.ids.len() < self.request.limit && !self.failed
    }

    /// Whether a control token was avoided.
    fn encode_word(&mut self, word: &[u8]) -> bool {
        let Request { model, added, .. } = self.request;
        let before = self.ids.len();
        let done = model.encode(word, &mut self.scratch.work, self.ids);
        self.failed |= done.is_none();
        // Merges can make the text of a control token that was not looked for.
        if self.may_stand(&self.ids[before..]) {
            return false;
        }
        self.ids.truncate(before);
        let control = |id: u32| added.is_control(id);
        let done = model.encode_without(word, &control, &mut self.scratch.work, self.ids);
        self.failed |= done.is_none();
        true
    }
}

/// The first seam of a text from `at` on, or its end.
#[inline]
fn next_seam(text: &[u8], mut at: usize, seam: &impl Fn(usize) -> bool) -> usize {
    while let Some(&byte) = text.get(at) {
        if byte & 0xc0 != 0x80 && seam(at) {
            return at;
        }
        at += 1;
    }
    text.len()
}

#[inline]
fn push_known(known: &[u32; ENTRY_IDS], ids: &mut Vec<u32>) {
    let count = known.iter().filter(|&&id| id != u32::MAX).count();
    ids.extend_from_slice(&known[..count]);
}

/// A word of at most [`KEY_BYTES`] bytes as a number; never zero, unlike an empty entry's.
#[inline]
fn key(text: &[u8], start: usize, length: usize) -> u128 {
    let bytes = match text[start..].first_chunk::<16>() {
        Some(bytes) => u128::from_le_bytes(*bytes),
        None => {
            let mut bytes = [0; 16];
            let rest = &text[start..];
            bytes[..rest.len()].copy_from_slice(rest);
            u128::from_le_bytes(bytes)
        }
    };
    bytes & ((1 << (8 * length)) - 1) | (length as u128) << 120
}

/// Words and their ids, each in one of the two places its hash says: a new one takes the place of an old.
#[derive(Debug)]
struct Cache {
    sets: Vec<Set>,
    seed: Seed,
    /// Insertions since the last growth.
    inserted: usize,
}

/// Two entries in one line of the CPU's cache; the younger is the first.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Set([Entry; 2]);

#[derive(Debug, Clone, Copy)]
struct Entry {
    key: u128,
    /// In order; the rest are `u32::MAX`.
    ids: [u32; ENTRY_IDS],
}

const VACANT: Entry = Entry {
    key: 0,
    ids: [u32::MAX; ENTRY_IDS],
};

impl Cache {
    fn new() -> Self {
        Self {
            sets: vec![Set([VACANT; 2]); MIN_ENTRIES / 2],
            seed: Seed::new(),
            inserted: 0,
        }
    }

    #[inline]
    fn place(&self, key: u128) -> usize {
        self.seed.word(key as u64, (key >> 64) as u64) as usize & (self.sets.len() - 1)
    }

    #[inline]
    fn get(&self, key: u128, place: usize) -> Option<&[u32; ENTRY_IDS]> {
        let Set([first, second]) = &self.sets[place];
        if first.key == key {
            return Some(&first.ids);
        }
        (second.key == key).then_some(&second.ids)
    }

    fn insert(&mut self, key: u128, ids: &[u32]) {
        if ids.len() > ENTRY_IDS {
            return;
        }
        if self.inserted > self.sets.len() && self.sets.len() < MAX_ENTRIES / 2 {
            self.grow();
        }
        self.inserted += 1;
        let mut entry = Entry { key, ..VACANT };
        entry.ids[..ids.len()].copy_from_slice(ids);
        self.put(entry);
    }

    fn put(&mut self, entry: Entry) {
        let place = self.place(entry.key);
        let Set(entries) = &mut self.sets[place];
        entries[1] = entries[0];
        entries[0] = entry;
    }

    fn grow(&mut self) {
        let size = self.sets.len() * 4;
        let old = std::mem::replace(&mut self.sets, vec![Set([VACANT; 2]); size]);
        self.inserted = 0;
        for Set([first, second]) in old {
            [second, first]
                .into_iter()
                .filter(|entry| entry.key != 0)
                .for_each(|e| self.put(e));
        }
    }
}

/// Longer words, or stretches of them, and their ids, each at one of the places its hash says: a new one takes
/// the place of an old only where all are taken.
#[derive(Debug)]
struct LongCache {
    entries: Vec<LongEntry>,
    words: Vec<u8>,
    ids: Vec<u32>,
    seed: Seed,
    inserted: usize,
    /// All is forgotten when words and ids have more bytes than these.
    most: usize,
}

/// A word's places in `words` and `ids`.
#[derive(Debug, Clone, Copy, Default)]
struct LongEntry {
    hash: u64,
    word: u32,
    ids: u32,
    length: u16,
    count: u16,
}

impl LongCache {
    fn new(most: usize) -> Self {
        Self {
            entries: vec![LongEntry::default(); MIN_ENTRIES],
            words: Vec::new(),
            ids: Vec::new(),
            seed: Seed::new(),
            inserted: 0,
            most,
        }
    }

    #[inline]
    fn at(&self, hash: u64) -> LongEntry {
        self.entries[hash as usize & (self.entries.len() - 1)]
    }

    /// Where a word of this hash may be.
    #[inline]
    fn places(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.entries.len() - 1;
        (0..WAYS).map(move |way| (hash as usize).wrapping_add(way) & mask)
    }

    #[inline]
    fn get(&self, hash: u64, word: &[u8]) -> Option<&[u32]> {
        let known = |at: &usize| {
            let entry = &self.entries[*at];
            entry.hash == hash && entry.length as usize == word.len()
        };
        let entry = self.entries[self.places(hash).find(known)?];
        let start = entry.word as usize;
        let same = self.words[start..start + word.len()] == *word;
        let start = entry.ids as usize;
        same.then(|| &self.ids[start..start + entry.count as usize])
    }

    fn put(&mut self, entry: LongEntry) {
        let vacant = |at: &usize| self.entries[*at].length == 0;
        let first = self.places(entry.hash).next();
        if let Some(at) = self.places(entry.hash).find(vacant).or(first) {
            self.entries[at] = entry;
        }
    }

    fn insert(&mut self, hash: u64, word: &[u8], ids: &[u32]) {
        let (Ok(length), Ok(count)) = (u16::try_from(word.len()), u16::try_from(ids.len())) else {
            return;
        };
        if self.words.len() + 4 * self.ids.len() > self.most {
            self.words.clear();
            self.ids.clear();
            self.entries.fill(LongEntry::default());
        }
        if self.inserted > self.entries.len() / 4 && self.entries.len() < MAX_LONG_ENTRIES {
            let size = self.entries.len() * 4;
            let old = std::mem::replace(&mut self.entries, vec![LongEntry::default(); size]);
            old.into_iter()
                .filter(|entry| entry.length != 0)
                .for_each(|entry| self.put(entry));
            self.inserted = 0;
        }
        self.inserted += 1;
        self.put(LongEntry {
            hash,
            word: self.words.len() as u32,
            ids: self.ids.len() as u32,
            length,
            count,
        });
        self.words.extend_from_slice(word);
        self.ids.extend_from_slice(ids);
    }
}
