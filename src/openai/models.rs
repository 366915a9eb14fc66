//! The objects behind `GET /v1/models`. Does not know which models there are.

use serde::Serialize;

/// One name that a caller may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model<'a> {
    /// What goes into `model` of a request.
    pub id: &'a str,
    /// The provider's name.
    pub owned_by: &'a str,
}

/// The body of `GET /v1/models`, in the order given. `created` is in Unix seconds; openai-python wants all four fields.
pub fn model_list<'a>(models: impl IntoIterator<Item = Model<'a>>, created: u64) -> Vec<u8> {
    let data: Vec<Object> = models.into_iter().map(|model| Object::new(model, created)).collect();
    to_json(&List { object: "list", data })
}

/// The body of `GET /v1/models/{id}`. `created` is in Unix seconds.
pub fn model_object(model: Model<'_>, created: u64) -> Vec<u8> {
    to_json(&Object::new(model, created))
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Object<'a>>,
}

#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
}

impl<'a> Object<'a> {
    fn new(model: Model<'a>, created: u64) -> Self {
        Object { id: model.id, object: "model", created, owned_by: model.owned_by }
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("structs of strings and integers have a JSON form")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GLM: Model = Model { id: "z-ai/glm-5.1", owned_by: "nim" };
    const QUOTED: Model = Model { id: "a\"b", owned_by: "p" };

    fn text(body: Vec<u8>) -> String {
        String::from_utf8(body).unwrap()
    }

    #[test]
    fn an_object_has_the_four_fields() {
        assert_eq!(
            text(model_object(GLM, 1_700_000_000)),
            r#"{"id":"z-ai/glm-5.1","object":"model","created":1700000000,"owned_by":"nim"}"#
        );
    }

    #[test]
    fn a_list_keeps_the_order() {
        assert_eq!(
            text(model_list([QUOTED, GLM], 7)),
            concat!(
                r#"{"object":"list","data":[{"id":"a\"b","object":"model","created":7,"owned_by":"p"},"#,
                r#"{"id":"z-ai/glm-5.1","object":"model","created":7,"owned_by":"nim"}]}"#
            )
        );
        assert_eq!(text(model_list([], 7)), r#"{"object":"list","data":[]}"#);
    }
}
