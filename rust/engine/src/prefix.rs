//! What the cache holds of prompts and answers that have run: requests that begin alike share its pages. A tree, a node
//! for each whole page of tokens. Knows pages by number alone.

use std::collections::HashMap;

use crate::batch::PAGE;
use crate::pages::Pages;
use crate::saved::{Before, SavedPage};

type Tokens = [u32; PAGE];

/// A place in the tree: the node whose page ends there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place(u32);

/// Where requests begin: keys that longrope turned by its long factors are others, and so are those of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Beginning {
    pub long: bool,
    /// Below 2^16.
    pub adapter: Option<u32>,
}

impl From<bool> for Beginning {
    fn from(long: bool) -> Self {
        Self {
            long,
            adapter: None,
        }
    }
}

fn root(from: impl Into<Beginning>) -> Place {
    let Beginning { long, adapter } = from.into();
    let adapter = adapter.map_or(0, |n| n + 1);
    Place(u32::MAX - 2 * adapter - u32::from(long))
}

#[derive(Debug)]
struct Node {
    parent: Place,
    tokens: Tokens,
    page: u32,
    /// Whether keys and values are there; else a request is about to compute them.
    ready: bool,
    /// Nodes below it and requests that stand here: it stays as long as there are any.
    holders: u32,
    /// When it was last of use, in looks at the tree.
    used: u64,
}

/// The pages of a prompt that are there already.
#[derive(Debug, Default)]
pub struct Found {
    pub pages: Vec<u32>,
    /// Where another request is computing the next one.
    pub pending: Option<Place>,
}

/// Pages by the tokens whose keys and values they hold, each after those before it.
#[derive(Debug, Default)]
pub struct Prefixes {
    /// By number; None: free.
    nodes: Vec<Option<Node>>,
    free: Vec<u32>,
    children: HashMap<(Place, Tokens), u32>,
    clock: u64,
}

/// A request's own place in the tree, and how many of its pages lie on the way there.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    place: Place,
    pages: usize,
    /// The first of them that are ready.
    ready: usize,
}

impl Prefixes {
    /// Pages it keeps.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn node(&self, place: Place) -> Option<&Node> {
        self.nodes.get(place.0 as usize)?.as_ref()
    }

    fn node_mut(&mut self, place: Place) -> Option<&mut Node> {
        self.nodes.get_mut(place.0 as usize)?.as_mut()
    }

    fn child(&self, place: Place, tokens: &Tokens) -> Option<Place> {
        self.children.get(&(place, *tokens)).map(|&i| Place(i))
    }

    /// The pages that hold the beginning of `ids`, all of which must be left to a request's owner to retain. At least one
    /// token stays outside: its logits are wanted.
    pub fn find(&mut self, ids: &[u32], from: impl Into<Beginning>) -> Found {
        self.clock += 1;
        let clock = self.clock;
        let mut found = Found::default();
        let mut place = root(from);
        for tokens in whole_pages(&ids[..ids.len().saturating_sub(1)]) {
            let Some(child) = self.child(place, tokens) else {
                break;
            };
            place = child;
            let Some(node) = self.node_mut(place) else {
                break;
            };
            node.used = clock;
            if !node.ready {
                found.pending = Some(place);
                break;
            }
            found.pages.push(node.page);
        }
        found
    }

    /// Whether a page that was pending is no longer.
    pub fn settled(&self, place: Place) -> bool {
        self.node(place).is_none_or(|node| node.ready)
    }

    /// Whether a request at `path` has passed `place`, or announced it.
    pub fn passes(&self, path: Path, place: Place) -> bool {
        let mut at = path.place;
        while at != place {
            let Some(node) = self.node(at) else {
                return false;
            };
            at = node.parent;
        }
        true
    }

    /// Where a request of these tokens begins that has `found` of them in its `table`; the rest of its whole pages
    /// before the last token are announced, so that others wait for them.
    pub fn enter(
        &mut self,
        ids: &[u32],
        from: impl Into<Beginning>,
        found: usize,
        table: &[u32],
        pages: &mut Pages,
    ) -> Path {
        let mut path = Path {
            place: root(from),
            pages: 0,
            ready: 0,
        };
        self.extend(&mut path, &ids[..ids.len().saturating_sub(1)], table, pages);
        // What was found is there, also where the tree has given its place up since.
        self.ran(&mut path, ids, found * PAGE, table, pages);
        path
    }

    /// Go on along `ids`, whose pages are those of `table`; what is not in the tree yet is added, not ready. Ends before
    /// what another request has announced: a place that is not ready is of one request alone.
    fn extend(&mut self, path: &mut Path, ids: &[u32], table: &[u32], pages: &mut Pages) {
        let from = path.place;
        for (tokens, &page) in whole_pages(ids).zip(table).skip(path.pages) {
            path.place = match self.child(path.place, tokens) {
                Some(child) if self.settled(child) => child,
                Some(_) => break,
                None => self.add(path.place, *tokens, page, pages),
            };
            path.pages += 1;
        }
        // From place to place: hold the new one before the old one is let go.
        if path.pages > 0 && from != path.place {
            self.hold(path.place);
            self.let_go(from);
        }
    }

    fn add(&mut self, parent: Place, tokens: Tokens, page: u32, pages: &mut Pages) -> Place {
        pages.keep(page);
        self.hold(parent);
        let node = Node {
            parent,
            tokens,
            page,
            ready: false,
            holders: 0,
            used: self.clock,
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.nodes[number as usize] = Some(node);
                number
            }
            None => {
                self.nodes.push(Some(node));
                self.nodes.len() as u32 - 1
            }
        };
        self.children.insert((parent, tokens), number);
        Place(number)
    }

    fn hold(&mut self, place: Place) {
        if let Some(node) = self.node_mut(place) {
            node.holders += 1;
        }
    }

    fn let_go(&mut self, place: Place) {
        if let Some(node) = self.node_mut(place) {
            node.holders -= 1;
        }
    }

    /// A request at `path` has the keys and values of the first `cached` of `ids` in the pages of its `table`.
    pub fn ran(
        &mut self,
        path: &mut Path,
        ids: &[u32],
        cached: usize,
        table: &[u32],
        pages: &mut Pages,
    ) {
        let whole = cached / PAGE;
        if whole > path.pages {
            self.extend(path, &ids[..whole * PAGE], table, pages);
        }
        if whole <= path.ready {
            return;
        }
        // Back from the end: what others have in this place is theirs to say.
        let mut place = path.place;
        let mut at = path.pages;
        while at > path.ready {
            let Some(node) = self.node_mut(place) else {
                break;
            };
            if at <= whole && table.get(at - 1) == Some(&node.page) {
                node.ready = true;
            }
            place = node.parent;
            at -= 1;
        }
        path.ready = whole.min(path.pages);
    }

    /// A request leaves. What it had announced and not computed goes with it.
    pub fn leave(&mut self, path: Path, pages: &mut Pages) {
        self.let_go(path.place);
        self.clock += 1;
        let clock = self.clock;
        let mut place = path.place;
        while let Some(node) = self.node_mut(place) {
            let parent = node.parent;
            match node.ready {
                true => node.used = clock,
                false => self.remove(place, pages),
            }
            place = parent;
        }
    }

    fn remove(&mut self, place: Place, pages: &mut Pages) {
        let Some(node) = self.nodes.get_mut(place.0 as usize).and_then(Option::take) else {
            return;
        };
        self.free.push(place.0);
        self.children.remove(&(node.parent, node.tokens));
        self.let_go(node.parent);
        pages.unkeep(node.page);
    }

    /// Give up pages until `wanted` are free or none is left that no request stands on: those first that were not of use
    /// for longest. Some more go at once: looking for them costs a look at all.
    pub fn evict(&mut self, wanted: usize, pages: &mut Pages) {
        let more = self.len() / 16;
        while pages.free() < wanted {
            let mut leaves: Vec<(u64, u32)> = (0..)
                .zip(&self.nodes)
                .filter_map(|(i, node)| Some((i, node.as_ref()?)))
                .filter(|(_, node)| node.holders == 0)
                .map(|(i, node)| (node.used, i))
                .collect();
            if leaves.is_empty() {
                return;
            }
            leaves.sort_unstable();
            for (used, leaf) in leaves {
                if pages.free() >= wanted + more {
                    return;
                }
                self.evict_branch(Place(leaf), used, wanted + more, pages);
            }
        }
    }

    /// A leaf and those above it that are leaves then and were of use no later.
    fn evict_branch(&mut self, leaf: Place, used: u64, wanted: usize, pages: &mut Pages) {
        let mut place = leaf;
        while let Some(node) = self.node(place)
            && node.holders == 0
            && node.used <= used
            && pages.free() < wanted
        {
            let parent = node.parent;
            self.remove(place, pages);
            place = parent;
        }
    }

    /// All pages that are filled, each after the one before it, and their numbers. Those of adapters are left out: their names
    /// say nothing in another engine.
    pub fn filled(&self) -> (Vec<SavedPage>, Vec<u32>) {
        let mut below: HashMap<Place, Vec<Place>> = HashMap::new();
        let nodes = (0..).zip(&self.nodes);
        for (i, node) in nodes.filter_map(|(i, node)| Some((i, node.as_ref()?))) {
            if node.ready {
                below.entry(node.parent).or_default().push(Place(i));
            }
        }
        let (mut saved, mut pages) = (Vec::new(), Vec::new());
        let mut next: Vec<(Before, Place)> = [false, true]
            .map(|long| (Before::Nothing { long }, root(long)))
            .into();
        while let Some((before, place)) = next.pop() {
            for child in below.remove(&place).unwrap_or_default() {
                let Some(node) = self.node(child) else {
                    continue;
                };
                next.push((Before::Page(saved.len()), child));
                saved.push(SavedPage {
                    before,
                    tokens: node.tokens,
                });
                pages.push(node.page);
            }
        }
        (saved, pages)
    }

    /// Take in what was saved, as far as there are free pages: `fill(page, at)` is to fill a page with the one at `at`.
    /// Those that are there already stay. Returns how many of them there are now.
    pub fn take_in(
        &mut self,
        saved: &[SavedPage],
        pages: &mut Pages,
        mut fill: impl FnMut(u32, usize),
    ) -> usize {
        self.clock += 1;
        let mut places: Vec<Option<Place>> = Vec::with_capacity(saved.len());
        for (at, page) in saved.iter().enumerate() {
            let parent = match page.before {
                Before::Nothing { long } => Some(root(long)),
                Before::Page(before) => places.get(before).copied().flatten(),
            };
            let place = parent.and_then(|parent| match self.child(parent, &page.tokens) {
                Some(place) => self.settled(place).then_some(place),
                None => {
                    let mut table = Vec::new();
                    if !pages.grow(&mut table, 1) {
                        return None;
                    }
                    fill(table[0], at);
                    let place = self.add(parent, page.tokens, table[0], pages);
                    pages.release(&mut table);
                    self.node_mut(place)?.ready = true;
                    Some(place)
                }
            });
            places.push(place);
        }
        places.iter().flatten().count()
    }

    /// Forget all: the cache is gone.
    pub fn clear(&mut self, pages: &mut Pages) {
        for node in self.nodes.drain(..).flatten() {
            pages.unkeep(node.page);
        }
        self.free.clear();
        self.children.clear();
    }
}

fn whole_pages(ids: &[u32]) -> impl Iterator<Item = &Tokens> {
    ids.as_chunks::<PAGE>().0.iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Cache {
        pages: Pages,
        prefixes: Prefixes,
    }

    /// A request as the engine holds it.
    struct Request {
        ids: Vec<u32>,
        table: Vec<u32>,
        path: Path,
    }

    impl Cache {
        fn new(pages: u32) -> Self {
            Self {
                pages: Pages::new(pages),
                prefixes: Prefixes::default(),
            }
        }

        fn enter(&mut self, ids: Vec<u32>) -> (Request, usize) {
            let mut table = self.prefixes.find(&ids, false).pages;
            self.pages.retain(&table);
            let found = table.len();
            assert!(self.pages.grow(&mut table, ids.len().div_ceil(PAGE)));
            let path = self
                .prefixes
                .enter(&ids, false, found, &table, &mut self.pages);
            (Request { ids, table, path }, found)
        }

        fn ran(&mut self, request: &mut Request, cached: usize) {
            let Request { ids, table, path } = request;
            self.prefixes.ran(path, ids, cached, table, &mut self.pages);
        }

        fn leave(&mut self, mut request: Request) {
            self.prefixes.leave(request.path, &mut self.pages);
            self.pages.release(&mut request.table);
        }

        fn run(&mut self, ids: Vec<u32>) -> usize {
            let all = ids.len();
            let (mut request, found) = self.enter(ids);
            self.ran(&mut request, all);
            self.leave(request);
            found
        }
    }

    fn ids(first: u32, pages: usize) -> Vec<u32> {
        (0..(pages * PAGE) as u32).map(|i| first + i).collect()
    }

    #[test]
    fn whole_pages_are_found_but_for_the_last_token() {
        let mut cache = Cache::new(20);
        assert_eq!(cache.run(ids(0, 3)), 0);
        assert_eq!(cache.run(ids(0, 3)), 2);
        assert_eq!(cache.run([ids(0, 3), vec![1]].concat()), 3);
        assert_eq!(cache.run([ids(0, 2), vec![1; 30]].concat()), 2);
        assert_eq!(cache.run(ids(1, 3)), 0);
        assert_eq!((cache.prefixes.len(), cache.pages.used()), (3 + 1 + 3, 0));
        // Keys turned by other factors are others, and those of adapters.
        assert!(cache.prefixes.find(&ids(0, 3), true).pages.is_empty());
        for (long, adapter) in [(false, 0), (true, 0), (false, 65535)] {
            let from = Beginning {
                long,
                adapter: Some(adapter),
            };
            assert!(cache.prefixes.find(&ids(0, 3), from).pages.is_empty());
            let (mut table, pages) = (Vec::new(), &mut cache.pages);
            assert!(pages.grow(&mut table, 1));
            let prefixes = &mut cache.prefixes;
            let mut path = prefixes.enter(&ids(0, 1), from, 0, &table, pages);
            prefixes.ran(&mut path, &ids(0, 1), PAGE, &table, pages);
            prefixes.leave(path, pages);
            pages.release(&mut table);
            assert_eq!(prefixes.find(&ids(0, 3), from).pages.len(), 1);
        }
        let saved = cache.prefixes.filled().0;
        assert_eq!(saved.len(), 3 + 1 + 3);
    }

    #[test]
    fn what_is_announced_is_waited_for_until_it_ran_or_its_request_left() {
        let mut cache = Cache::new(20);
        let (mut first, _) = cache.enter(ids(0, 4));
        let found = cache.prefixes.find(&ids(0, 4), false);
        let place = found.pending.unwrap();
        assert!(found.pages.is_empty() && !cache.prefixes.settled(place));
        cache.ran(&mut first, PAGE + 3);
        assert!(cache.prefixes.settled(place));
        let found = cache.prefixes.find(&ids(0, 4), false);
        assert_eq!(found.pages.len(), 1);
        let place = found.pending.unwrap();
        cache.leave(first);
        assert!(cache.prefixes.settled(place));
        assert_eq!(cache.prefixes.find(&ids(0, 4), false).pending, None);
        assert_eq!((cache.prefixes.len(), cache.pages.used()), (1, 0));
    }

    #[test]
    fn nobody_stands_on_what_another_only_announced() {
        let mut cache = Cache::new(20);
        let (mut decoding, _) = cache.enter(ids(0, 1));
        let (announced, _) = cache.enter([ids(0, 2), vec![7]].concat());
        // Its own decoding comes to the same tokens.
        decoding.ids = ids(0, 3);
        assert!(cache.pages.grow(&mut decoding.table, 3));
        cache.ran(&mut decoding, 3 * PAGE);
        cache.leave(announced);
        assert_eq!(cache.prefixes.find(&ids(0, 3), false).pending, None);
        cache.ran(&mut decoding, 3 * PAGE);
        cache.leave(decoding);
        let found = cache.prefixes.find(&ids(0, 4), false);
        assert_eq!((found.pages.len(), found.pending), (3, None));
        assert_eq!(cache.pages.used(), 0);
    }

    #[test]
    fn the_longest_unused_goes_first_and_nothing_in_use() {
        let mut cache = Cache::new(10);
        for first in [0, 1000, 2000] {
            cache.run([ids(first, 3), vec![1]].concat());
            assert_eq!(cache.pages.used(), 0);
        }
        // The first is of use again, the second is not.
        assert_eq!(cache.prefixes.find(&ids(0, 4), false).pages.len(), 3);
        let (held, found) = cache.enter(ids(2000, 2));
        assert_eq!(found, 1);
        cache.prefixes.evict(3, &mut cache.pages);
        assert!(cache.pages.free() >= 3);
        assert_eq!(cache.prefixes.find(&ids(0, 4), false).pages.len(), 3);
        assert!(cache.prefixes.find(&ids(1000, 4), false).pages.is_empty());
        cache.prefixes.evict(99, &mut cache.pages);
        assert_eq!(cache.pages.idle(), 0);
        cache.leave(held);
        cache.prefixes.clear(&mut cache.pages);
        assert_eq!((cache.pages.free(), cache.prefixes.len()), (10, 0));
    }

    #[test]
    fn what_was_found_and_given_up_before_its_request_entered_is_there_again() {
        let mut cache = Cache::new(20);
        cache.run(ids(0, 3));
        let asked = ids(0, 5);
        let mut table = cache.prefixes.find(&asked, false).pages;
        cache.pages.retain(&table);
        cache.prefixes.evict(20, &mut cache.pages);
        assert!(cache.prefixes.is_empty() && cache.pages.grow(&mut table, 5));
        let mut path = cache
            .prefixes
            .enter(&asked, false, 3, &table, &mut cache.pages);
        // The first three hold their keys and values, the fourth is yet to run.
        let found = cache.prefixes.find(&asked, false);
        assert_eq!((found.pages.len(), found.pending.is_some()), (3, true));
        let whole = 5 * PAGE;
        cache
            .prefixes
            .ran(&mut path, &asked, whole, &table, &mut cache.pages);
        cache.prefixes.leave(path, &mut cache.pages);
        cache.pages.release(&mut table);
        assert_eq!((cache.prefixes.len(), cache.pages.used()), (5, 0));
    }

    #[test]
    fn random_requests_leave_no_page_behind() {
        let mut state = 3u64;
        let mut random = move |n: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let mut cache = Cache::new(64);
        let mut running: Vec<(Request, usize)> = Vec::new();
        for _ in 0..3000 {
            if running.len() < 6 && random(2) == 0 {
                let ids: Vec<u32> = (0..20 + random(100))
                    .map(|i| (i / 20 * random(2)) as u32)
                    .collect();
                cache.prefixes.evict(8, &mut cache.pages);
                if cache.pages.free() >= 8 && cache.prefixes.find(&ids, false).pending.is_none() {
                    let (request, found) = cache.enter(ids);
                    running.push((request, found * PAGE));
                }
            } else if !running.is_empty() {
                let at = random(running.len() as u64) as usize;
                let (request, cached) = &mut running[at];
                *cached = (*cached + random(40) as usize).min(request.ids.len());
                let cached = *cached;
                cache.ran(request, cached);
                if cached == request.ids.len() || random(8) == 0 {
                    let (request, _) = running.remove(at);
                    cache.leave(request);
                }
            }
        }
        for (request, _) in running {
            cache.leave(request);
        }
        assert_eq!(cache.pages.used(), 0);
        assert_eq!(cache.pages.idle(), cache.prefixes.len());
        cache.prefixes.evict(64, &mut cache.pages);
        assert_eq!((cache.pages.free(), cache.prefixes.len()), (64, 0));
    }
}
