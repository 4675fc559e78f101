//! The order of what is on the screen: a list from back to front in which overlays (menus and tooltips of X11
//! applications, which place themselves) stay above everything else.

use smithay::utils::{Logical, Point};

/// Something at a place.
#[derive(Clone, Debug)]
pub struct Entry<T> {
    /// What it is.
    pub item: T,
    /// Where its geometry starts.
    pub location: Point<i32, Logical>,
    /// Whether it stays above everything that is no overlay.
    pub overlay: bool,
}

/// Entries from back to front.
#[derive(Clone, Debug)]
pub struct Stack<T>(Vec<Entry<T>>);

impl<T> Default for Stack<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> Stack<T> {
    /// Puts `item` above all of its kind, or moves it if it is there already.
    pub fn insert(&mut self, item: T, location: Point<i32, Logical>, overlay: bool) {
        self.remove(&item);
        self.push(Entry { item, location, overlay });
    }

    /// Takes `item` off; whether it was there.
    pub fn remove(&mut self, item: &T) -> bool {
        let before = self.0.len();
        self.0.retain(|entry| entry.item != *item);
        self.0.len() != before
    }

    /// Lifts `item` above all of its kind; whether it is there.
    pub fn raise(&mut self, item: &T) -> bool {
        let Some(at) = self.0.iter().position(|entry| entry.item == *item) else { return false };
        let entry = self.0.remove(at);
        self.push(entry);
        true
    }

    /// Changes where `item` is, not how high; whether that is a change.
    pub fn relocate(&mut self, item: &T, location: Point<i32, Logical>) -> bool {
        let found = self.0.iter_mut().find(|entry| entry.item == *item && entry.location != location);
        found.is_some_and(|entry| {
            entry.location = location;
            true
        })
    }

    /// Keeps what `keep` says; whether anything went.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|entry| keep(&entry.item));
        self.0.len() != before
    }

    /// From back to front.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Entry<T>> {
        self.0.iter()
    }

    /// From back to front, without places.
    pub fn items(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.0.iter().map(|entry| &entry.item)
    }

    /// The entry of `item`.
    pub fn get(&self, item: &T) -> Option<&Entry<T>> {
        self.0.iter().find(|entry| entry.item == *item)
    }

    /// The highest that is no overlay.
    pub fn top(&self) -> Option<&T> {
        self.0.iter().rev().find(|entry| !entry.overlay).map(|entry| &entry.item)
    }

    fn push(&mut self, entry: Entry<T>) {
        let at = match entry.overlay {
            true => self.0.len(),
            false => self.0.partition_point(|other| !other.overlay),
        };
        self.0.insert(at, entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(x: i32) -> Point<i32, Logical> {
        Point::from((x, 0))
    }

    #[test]
    fn new_and_raised_windows_are_in_front_but_below_overlays() {
        let mut stack = Stack::default();
        stack.insert("a", at(0), false);
        stack.insert("menu", at(0), true);
        stack.insert("b", at(0), false);
        assert_eq!(stack.items().copied().collect::<Vec<_>>(), ["a", "b", "menu"]);
        assert!(stack.raise(&"a"));
        assert!(!stack.raise(&"nobody"));
        assert_eq!(stack.items().copied().collect::<Vec<_>>(), ["b", "a", "menu"]);
        assert_eq!(stack.top(), Some(&"a"));
        stack.insert("tooltip", at(0), true);
        assert_eq!(stack.items().next_back(), Some(&"tooltip"));
    }

    #[test]
    fn moving_keeps_the_order_and_says_whether_it_is_a_change() {
        let mut stack = Stack::default();
        stack.insert("a", at(0), false);
        stack.insert("b", at(0), false);
        assert!(stack.relocate(&"a", at(5)));
        assert!(!stack.relocate(&"a", at(5)));
        assert!(!stack.relocate(&"nobody", at(5)));
        assert_eq!(stack.get(&"a").map(|entry| entry.location), Some(at(5)));
        assert_eq!(stack.top(), Some(&"b"));
    }

    #[test]
    fn an_empty_stack_has_no_top() {
        let mut stack = Stack::default();
        assert_eq!(stack.top(), None);
        stack.insert("menu", at(0), true);
        assert_eq!(stack.top(), None, "an overlay takes no focus");
        assert!(stack.remove(&"menu"));
        assert!(!stack.remove(&"menu"));
    }
}
