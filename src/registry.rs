//! Which provider serves a model name, and which names there are.
//!
//! Knows providers by their index in the configuration. Does not know how they fare: a name leads to the same providers
//! whatever their state.

use std::collections::HashMap;

use crate::config::Provider;
use crate::edits::edits;
use crate::error::Error;
use crate::openai::Model;

/// How many look-alikes a refusal names.
const NEAREST_LIMIT: usize = 3;
/// A longer name is no slip of the pen, and comparing it would be work of the caller's choice.
const COMPARED_LIMIT_CHARS: usize = 200;
/// A shorter name is part of too many others to be a hint.
const CONTAINED_MIN_CHARS: usize = 3;

/// Every name that a caller may use.
///
/// A name is looked up as it stands first; the first provider that lists it owns it, and the others can stand in. Only then
/// is it read as `<provider>/<model>`, which is that provider's alone: names contain slashes themselves (`z-ai/glm-5.1`),
/// providers' names do not.
#[derive(Debug)]
pub struct Registry {
    /// By index.
    providers: Vec<String>,
    /// All names, `<provider>/<model>` for each model included, each with whom it leads to, the owner first.
    targets: HashMap<String, Vec<Target>>,
    /// The names to show, in order; each is a key of `targets`.
    listed: Vec<String>,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route<'a> {
    /// Index into the providers of the configuration.
    pub provider: usize,
    /// The name that it lists the model under.
    pub id: &'a str,
    /// The name that the provider gets.
    pub upstream: &'a str,
}

#[derive(Debug, Clone)]
struct Target {
    provider: usize,
    id: String,
    upstream: String,
}

impl Registry {
    /// Indexes the models of all providers, in the order of the configuration.
    pub fn new(providers: &[Provider]) -> Self {
        let mut registry = Registry {
            providers: providers.iter().map(|provider| provider.name.clone()).collect(),
            targets: HashMap::new(),
            listed: Vec::new(),
        };
        let models = || {
            providers.iter().enumerate().flat_map(|(provider, config)| {
                config.models.iter().map(move |model| {
                    let (id, upstream) = (model.id.clone(), model.upstream.clone());
                    (Target { provider, id: id.clone(), upstream }, &config.name, id)
                })
            })
        };
        for (target, _, id) in models() {
            let targets = registry.targets.entry(id.clone()).or_default();
            if targets.is_empty() {
                registry.listed.push(id);
            }
            if targets.iter().all(|other| other.provider != target.provider) {
                targets.push(target);
            }
        }
        // Only now, so that a plain name beats a prefixed one of any provider.
        for (target, provider, id) in models() {
            let shared = registry.targets[&id].len() > 1;
            let name = format!("{provider}/{id}");
            if registry.targets.contains_key(&name) {
                continue;
            }
            if shared {
                registry.listed.push(name.clone());
            }
            registry.targets.insert(name, vec![target]);
        }
        registry
    }

    /// Where a request for `model` can go, in the order of the configuration.
    ///
    /// # Errors
    /// [`Error::ModelNotFound`] with the names that look most like it.
    pub fn resolve(&self, model: &str) -> Result<impl Iterator<Item = Route<'_>>, Error> {
        let (_, targets) = self.find(model)?;
        Ok(targets.iter().map(|target| Route {
            provider: target.provider,
            id: &target.id,
            upstream: &target.upstream,
        }))
    }

    /// What `GET /v1/models/{id}` shows: any name that [`resolve`](Self::resolve) takes.
    ///
    /// # Errors
    /// [`Error::ModelNotFound`] with the names that look most like it.
    pub fn get(&self, id: &str) -> Result<Model<'_>, Error> {
        let (id, targets) = self.find(id)?;
        Ok(Model { id, owned_by: self.owner(targets) })
    }

    /// What `GET /v1/models` shows: each plain name once, owned by the provider it leads to, in the order of the
    /// configuration; then `<provider>/<model>` for each provider of a name that several list.
    pub fn models(&self) -> impl Iterator<Item = Model<'_>> {
        self.listed.iter().map(|id| Model { id, owned_by: self.owner(&self.targets[id]) })
    }

    fn owner(&self, targets: &[Target]) -> &str {
        &self.providers[targets[0].provider]
    }

    fn find(&self, model: &str) -> Result<(&str, &[Target]), Error> {
        let found = self
            .targets
            .get_key_value(model)
            .map(|(name, targets)| (name.as_str(), targets.as_slice()));
        found.ok_or_else(|| Error::ModelNotFound {
            model: model.to_owned(),
            nearest: self.nearest(model),
        })
    }

    fn nearest(&self, asked: &str) -> Vec<String> {
        if asked.chars().nth(COMPARED_LIMIT_CHARS).is_some() {
            return Vec::new();
        }
        let asked = asked.to_lowercase();
        let mut near: Vec<(usize, &String)> = self
            .listed
            .iter()
            .filter_map(|name| Some((likeness(&asked, &name.to_lowercase())?, name)))
            .collect();
        near.sort_by_key(|(distance, _)| *distance);
        near.into_iter().take(NEAREST_LIMIT).map(|(_, name)| name.clone()).collect()
    }
}

/// How many edits lie between two names that look alike: one contains the other, or a third of the longer one at most
/// differs. `None` for others.
fn likeness(a: &str, b: &str) -> Option<usize> {
    let (a_chars, b_chars): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let (shorter, longer) = (a_chars.len().min(b_chars.len()), a_chars.len().max(b_chars.len()));
    let contained = shorter >= CONTAINED_MIN_CHARS && (a.contains(b) || b.contains(a));
    if contained {
        // All that is missing has to be inserted, and nothing else.
        return Some(longer - shorter);
    }
    let distance = edits(&a_chars, &b_chars);
    (distance <= longer / 3).then_some(distance)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::{self, BaseUrl, Budget, CooldownScope, Mode, Pace, RateLimit, Retry};

    /// A provider with these models; `id=upstream` is an alias.
    fn provider(name: &str, models: &[&str]) -> Provider {
        let models = models.iter().map(|model| {
            let (id, upstream) = model.split_once('=').unwrap_or((model, model));
            config::Model { id: id.into(), upstream: upstream.into(), rate_limit: None }
        });
        Provider {
            name: name.into(),
            base_url: BaseUrl::new(false, "127.0.0.1".into(), 80, String::new()),
            api_keys: Vec::new(),
            headers: Vec::new(),
            ca_pem: None,
            proxy: None,
            models: models.collect(),
            rate_limit: RateLimit {
                pace: Pace {
                    mode: Mode::Spaced,
                    rpm: Some(60.0),
                    interval: Duration::from_secs(1),
                    capacity: 1,
                },
                budget: Budget {
                    window: None,
                    window_margin: Duration::ZERO,
                    day: None,
                    tokens_per_minute: None,
                    max_concurrent: None,
                },
                max_wait: None,
                cooldown: CooldownScope::Auto,
                adaptive: false,
            },
            retry: Retry { attempts: 1, statuses: Vec::new(), max_cooldown: Duration::ZERO },
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(600),
            idle_timeout: Duration::from_secs(300),
            max_queue: 1000,
            pool_max_idle: 16,
            pool_idle: Duration::from_secs(50),
        }
    }

    fn registry(providers: &[(&str, &[&str])]) -> Registry {
        Registry::new(
            &providers.iter().map(|(name, models)| provider(name, models)).collect::<Vec<_>>(),
        )
    }

    fn listed(registry: &Registry) -> Vec<(&str, &str)> {
        registry.models().map(|model| (model.id, model.owned_by)).collect()
    }

    fn nearest(registry: &Registry, asked: &str) -> Vec<String> {
        match registry.resolve(asked).map(Iterator::count) {
            Err(Error::ModelNotFound { model, nearest }) if model == asked => nearest,
            other => panic!("{asked}: {other:?}"),
        }
    }

    #[test]
    fn exact_then_prefixed() {
        let registry = registry(&[
            ("nim", &["z-ai/glm-5.1", "fast=meta/llama-3.1-8b", "both"]),
            ("z-ai", &["glm-5.1", "both", "glm-5.1-air=air"]),
            ("x", &["a/b/c"]),
        ]);
        for (asked, provider, id, upstream) in [
            ("z-ai/glm-5.1", 0, "z-ai/glm-5.1", "z-ai/glm-5.1"),
            ("nim/z-ai/glm-5.1", 0, "z-ai/glm-5.1", "z-ai/glm-5.1"),
            ("glm-5.1", 1, "glm-5.1", "glm-5.1"),
            ("fast", 0, "fast", "meta/llama-3.1-8b"),
            ("nim/fast", 0, "fast", "meta/llama-3.1-8b"),
            ("both", 0, "both", "both"),
            ("nim/both", 0, "both", "both"),
            ("z-ai/both", 1, "both", "both"),
            ("z-ai/glm-5.1-air", 1, "glm-5.1-air", "air"),
            ("a/b/c", 2, "a/b/c", "a/b/c"),
            ("x/a/b/c", 2, "a/b/c", "a/b/c"),
        ] {
            assert_eq!(
                registry.resolve(asked).unwrap().next(),
                Some(Route { provider, id, upstream }),
                "{asked}"
            );
            let owner = ["nim", "z-ai", "x"][provider];
            assert_eq!(registry.get(asked), Ok(Model { id: asked, owned_by: owner }), "{asked}");
        }
        for asked in [
            "",
            "/",
            "nim/",
            "/both",
            "x/both",
            "meta/llama-3.1-8b",
            "nim/nim/fast",
            "Both",
            "both ",
        ] {
            let refused = registry.resolve(asked).map(drop);
            assert!(matches!(refused, Err(Error::ModelNotFound { .. })), "{asked}");
            assert_eq!(registry.get(asked).map(drop), refused, "{asked}");
        }
    }

    #[test]
    fn the_list_names_each_once_and_shared_ones_by_provider_too() {
        let registry = registry(&[
            ("p", &["a", "both", "alias=x"]),
            ("q", &["both", "b"]),
            ("r", &["b", "q/b", "c", "c"]),
        ]);
        assert_eq!(
            listed(&registry),
            [
                ("a", "p"),
                ("both", "p"),
                ("alias", "p"),
                ("b", "q"),
                ("q/b", "r"),
                ("c", "r"),
                ("p/both", "p"),
                ("q/both", "q"),
                ("r/b", "r"),
            ]
        );
    }

    #[test]
    fn no_provider_no_names() {
        let registry = registry(&[]);
        assert!(listed(&registry).is_empty());
        assert!(nearest(&registry, "gpt-4").is_empty());
    }

    #[test]
    fn look_alikes() {
        let registry = registry(&[(
            "p",
            &[
                "gpt-4o-mini",
                "gpt-4o",
                "gpt-4.1",
                "z-ai/glm-5.1",
                "deepseek-chat",
                "Qwen3-8B",
                "o1",
                "é",
            ],
        )]);
        for (asked, names) in [
            ("gpt4o", &["gpt-4o"][..]),
            ("GPT-4O", &["gpt-4o", "gpt-4.1", "gpt-4o-mini"]),
            ("gpt-4", &["gpt-4o", "gpt-4.1", "gpt-4o-mini"]),
            ("glm-5.1", &["z-ai/glm-5.1"]),
            ("openai/gpt-4o-mini", &["gpt-4o-mini", "gpt-4o"]),
            ("deepseek-caht", &["deepseek-chat"]),
            ("qwen3-8b", &["Qwen3-8B"]),
            ("o2", &[]),
            ("claude-sonnet-5", &[]),
            ("", &[]),
        ] {
            assert_eq!(nearest(&registry, asked), names, "{asked}");
        }
        let long = "gpt-4o".repeat(1_000_000);
        assert!(nearest(&registry, &long).is_empty());
    }

    proptest! {
        /// Two-letter names with slashes collide all the time.
        #[test]
        fn resolves_as_the_rule_says(
            models in prop::collection::vec(prop::collection::vec("[ab](/[ab]){0,2}", 1..4), 1..4),
            asked in "[abc](/[ab]){0,3}",
        ) {
            let names = ["a", "b", "c"];
            let providers: Vec<Provider> = models
                .iter()
                .zip(names)
                .map(|(models, name)| provider(name, &models.iter().map(String::as_str).collect::<Vec<_>>()))
                .collect();
            let registry = Registry::new(&providers);

            let lists = |provider: usize, name: &str| models[provider].iter().any(|model| model == name);
            let exact: Vec<_> = (0..models.len()).filter(|&at| lists(at, &asked)).map(|at| (at, asked.as_str())).collect();
            let prefixed = || {
                let (name, model) = asked.split_once('/')?;
                let at = names[..models.len()].iter().position(|known| *known == name)?;
                lists(at, model).then_some((at, model))
            };
            let expected = if exact.is_empty() { prefixed().into_iter().collect() } else { exact };
            let found = registry.resolve(&asked).into_iter().flatten();
            let found: Vec<_> = found.map(|route| (route.provider, route.upstream)).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn the_list_is_unique_complete_and_resolvable(
            models in prop::collection::vec(prop::collection::vec("[ab](/[ab]){0,2}", 1..4), 1..4),
        ) {
            let providers: Vec<Provider> = models
                .iter()
                .zip(["a", "b", "c"])
                .map(|(models, name)| provider(name, &models.iter().map(String::as_str).collect::<Vec<_>>()))
                .collect();
            let registry = Registry::new(&providers);
            let mut ids: Vec<&str> = registry.models().map(|model| model.id).collect();
            for model in registry.models() {
                prop_assert_eq!(registry.get(model.id), Ok(model));
            }
            for (at, provider) in providers.iter().enumerate() {
                for model in &provider.models {
                    prop_assert!(ids.contains(&model.id.as_str()));
                    let shared = providers.iter().enumerate().any(|(other, p)| other != at && p.models.contains(model));
                    if shared {
                        let prefixed = format!("{}/{}", provider.name, model.id);
                        prop_assert!(ids.contains(&prefixed.as_str()), "{}", prefixed);
                    }
                }
            }
            let listed = ids.len();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), listed);
        }

        #[test]
        fn distance_is_a_metric(a in "[ab]{0,6}", b in "[ab]{0,6}", c in "[ab]{0,6}") {
            let distance = |a: &str, b: &str| edits(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
            prop_assert_eq!(distance(&a, &b), distance(&b, &a));
            prop_assert_eq!(distance(&a, &b) == 0, a == b);
            prop_assert!(distance(&a, &c) <= distance(&a, &b) + distance(&b, &c));
        }
    }
}
