//! Which module uses which: no circles, and arrows that point down.
//!
//! A module uses another one where it names something that this one defines. What a module only
//! hands on (`pub use`) counts as used where it is defined. Tests within the code do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::visit::Visit;
use syn::{Attribute, Ident, Item, UseTree, Visibility};

/// A module's path within its crate, such as `["cache", "state"]`. The crate itself is empty.
type Module = Vec<String>;
/// A path, the name under which it is known, and whether it is handed on.
type Import = (Vec<String>, String, bool);

#[derive(Default)]
struct Source {
    /// Paths that the module names, as written.
    named: Vec<Vec<String>>,
    /// What it imports, public or not.
    imports: Vec<Import>,
    /// First names of all paths.
    mentioned: BTreeSet<String>,
    /// What is defined in it.
    defined: BTreeSet<String>,
}

struct Crate {
    modules: BTreeMap<Module, Source>,
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<Ident>().is_ok_and(|condition| condition == "test")
    })
}

/// The paths that a tree of imports names, with the names they get.
fn flatten(tree: &UseTree, is_public: bool, before: &mut Vec<String>, into: &mut Vec<Import>) {
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, is_public, before, into);
            before.pop();
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            match name.as_str() {
                "self" => into.push((
                    before.clone(),
                    before.last().cloned().unwrap_or_default(),
                    is_public,
                )),
                _ => into.push((
                    [&before[..], std::slice::from_ref(&name)].concat(),
                    name,
                    is_public,
                )),
            }
        }
        UseTree::Rename(rename) => {
            let path = [&before[..], &[rename.ident.to_string()]].concat();
            into.push((path, rename.rename.to_string(), is_public));
        }
        UseTree::Glob(_) => into.push((before.clone(), "*".into(), is_public)),
        UseTree::Group(group) => {
            group.items.iter().for_each(|tree| flatten(tree, is_public, before, into))
        }
    }
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let is_public = !matches!(item.vis, Visibility::Inherited);
        flatten(&item.tree, is_public, &mut Vec::new(), &mut self.imports);
    }

    fn visit_item_mod(&mut self, _: &'ast syn::ItemMod) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.mentioned.extend(names.first().cloned());
        if names.len() > 1 {
            self.named.push(names);
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

fn name_of(item: &Item) -> Option<&Ident> {
    Some(match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        _ => return None,
    })
}

impl Crate {
    fn read(root: &Path) -> Crate {
        let mut found = Crate { modules: BTreeMap::new() };
        found.add(&root.join("src/lib.rs"), &root.join("src"), &Module::new());
        found
    }

    /// Adds a module that lies in `file`, and those below it, which lie in `folder`.
    fn add(&mut self, file: &Path, folder: &Path, module: &Module) {
        let text =
            std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.add_items(&parsed.items, folder, module);
    }

    fn add_items(&mut self, items: &[Item], folder: &Path, module: &Module) {
        let mut source = Source::default();
        for item in items {
            match item {
                Item::Mod(below) if is_for_tests(&below.attrs) => continue,
                Item::Mod(below) => {
                    let name = below.ident.to_string();
                    let path = [&module[..], std::slice::from_ref(&name)].concat();
                    let inner = folder.join(&name);
                    if let Some((_, items)) = &below.content {
                        self.add_items(items, &inner, &path);
                        continue;
                    }
                    let beside = folder.join(format!("{name}.rs"));
                    let file = if beside.exists() { beside } else { inner.join("mod.rs") };
                    self.add(&file, &inner, &path);
                }
                _ => {
                    source.defined.extend(name_of(item).map(ToString::to_string));
                    source.visit_item(item);
                }
            }
        }
        // The two ways of one module under a condition are read once.
        self.modules.insert(module.clone(), source);
    }

    /// The module in which what `path` names is defined, as seen from `from`; `None` for what is
    /// not of this crate.
    fn definer(&self, from: &Module, path: &[String], depth: u32) -> Option<Module> {
        assert!(depth < 20, "{path:?} in {from:?} leads in a circle");
        let (first, rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Module::new(),
            "self" => from.clone(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            name => {
                let below = [&from[..], &[name.to_string()]].concat();
                if self.modules.contains_key(&below) {
                    below
                } else {
                    let imports = &self.modules.get(from)?.imports;
                    let (imported, ..) =
                        imports.iter().find(|(_, known_as, _)| known_as == name)?;
                    // A crate may have an item of its own name.
                    let is_local = imported.first().is_some_and(|first| first != name);
                    let whole = [&imported[..], rest].concat();
                    return is_local.then(|| self.definer(from, &whole, depth + 1))?;
                }
            }
        };
        let mut rest = rest;
        while let Some((name, after)) = rest.split_first() {
            if name == "super" {
                at.pop();
                rest = after;
                continue;
            }
            let below = [&at[..], std::slice::from_ref(name)].concat();
            if !self.modules.contains_key(&below) {
                break;
            }
            (at, rest) = (below, after);
        }
        let Some(name) = rest.first() else { return Some(at) };
        let source = self.modules.get(&at)?;
        if source.defined.contains(name) || at == *from {
            return Some(at);
        }
        let handed_on = source.imports.iter().find(|(_, known_as, _)| known_as == name);
        match handed_on {
            Some((path, ..)) => self.definer(&at, path, depth + 1),
            None => Some(at),
        }
    }

    /// Each module, and the others that it uses.
    fn arrows(&self) -> BTreeMap<Module, BTreeSet<Module>> {
        let mut arrows = BTreeMap::new();
        for (module, source) in &self.modules {
            let used = source.imports.iter().filter(|(path, known_as, is_public)| {
                !path.is_empty() && (!is_public || source.mentioned.contains(known_as))
            });
            let paths = used.map(|(path, ..)| path).chain(&source.named);
            let mut used: BTreeSet<_> =
                paths.filter_map(|path| self.definer(module, path, 0)).collect();
            used.remove(module);
            arrows.insert(module.clone(), used);
        }
        arrows
    }
}

/// The groups of modules that all use each other, directly or not.
fn circles(arrows: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<BTreeSet<Module>> {
    let reach = |from: &Module| {
        let (mut reached, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = next.pop() {
            for used in arrows.get(&module).into_iter().flatten() {
                if reached.insert(used.clone()) {
                    next.push(used.clone());
                }
            }
        }
        reached
    };
    let reached: BTreeMap<_, _> = arrows.keys().map(|module| (module, reach(module))).collect();
    let circle_of = |module: &Module| -> BTreeSet<Module> {
        let others = reached[module]
            .iter()
            .filter(|other| reached.get(other).is_some_and(|it| it.contains(module)));
        others.cloned().collect()
    };
    let all: BTreeSet<_> =
        arrows.keys().map(circle_of).filter(|circle| !circle.is_empty()).collect();
    all.into_iter().collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn shown(modules: &BTreeSet<Module>) -> String {
    modules.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(", ")
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let mut found = Vec::new();
    for name in ["libwb", "wbctl", "wbformat", "wbcheck", "wbdump", "manual"] {
        let arrows = Crate::read(&root().join(name)).arrows();
        if std::env::var_os("WB_SHOW_MODULES").is_some() {
            for (module, used) in &arrows {
                println!("{name}::{} -> {}", module.join("::"), shown(used));
            }
        }
        found.extend(circles(&arrows).iter().map(|circle| format!("{name}: {}", shown(circle))));
    }
    assert!(found.is_empty(), "circles:\n{}", found.join("\n"));
}
