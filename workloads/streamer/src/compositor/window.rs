//! A window, Wayland's or X11's.
//!
//! smithay has a type for both, but it knows the surface of an X11 window only from Xwayland 23.1 on, which names it by
//! a serial number. Older ones (22.1 in Debian 12) name it by its object id, and matching that is left to compositors:
//! so X11 windows and their surfaces are kept here.

use std::{borrow::Cow, cell::RefCell, rc::Rc, time::Duration};

use smithay::{
    backend::renderer::{
        element::{AsRenderElements, Kind, surface::render_elements_from_surface_tree},
        pixman::PixmanRenderer,
        utils::with_renderer_surface_state,
    },
    desktop::{
        Window as WaylandWindow, WindowSurfaceType,
        space::SpaceElement,
        utils::{
            OutputPresentationFeedback, bbox_from_surface_tree, send_frames_surface_tree,
            take_presentation_feedback_surface_tree, under_from_surface_tree, with_surfaces_surface_tree,
        },
    },
    output::Output,
    reexports::{
        wayland_protocols::wp::presentation_time::server::wp_presentation_feedback::Kind as FeedbackKind,
        wayland_server::protocol::wl_surface::WlSurface,
    },
    utils::{IsAlive, Logical, Physical, Point, Rectangle, Scale},
    wayland::{seat::WaylandFocus, shell::xdg::ToplevelSurface},
    xwayland::X11Surface,
};

use super::screen::Element;

/// One window; clones are the same one.
#[derive(Clone, Debug)]
pub enum Window {
    /// An xdg toplevel with its popups.
    Wayland(WaylandWindow),
    /// A managed or self-placing X11 window.
    X11(Rc<X11Window>),
}

/// An X11 window and its surface.
#[derive(Debug)]
pub struct X11Window {
    x11: X11Surface,
    /// The surface, where Xwayland names it by id.
    matched: RefCell<Option<WlSurface>>,
}

impl Window {
    /// The window of a toplevel.
    pub fn new_wayland(toplevel: ToplevelSurface) -> Self {
        Self::Wayland(WaylandWindow::new_wayland_window(toplevel))
    }

    /// A window of Xwayland.
    pub fn new_x11(x11: X11Surface) -> Self {
        Self::X11(Rc::new(X11Window { x11, matched: RefCell::new(None) }))
    }

    /// The toplevel, if it is a Wayland window.
    pub fn toplevel(&self) -> Option<&ToplevelSurface> {
        match self {
            Self::Wayland(window) => window.toplevel(),
            Self::X11(_) => None,
        }
    }

    /// The X11 window, if it is one.
    pub fn x11(&self) -> Option<&X11Surface> {
        match self {
            Self::Wayland(_) => None,
            Self::X11(window) => Some(&window.x11),
        }
    }

    /// The surface with the content; an X11 window may not have one yet.
    pub fn surface(&self) -> Option<Cow<'_, WlSurface>> {
        match self {
            Self::Wayland(window) => window.wl_surface(),
            Self::X11(window) => {
                let surface = window.x11.wl_surface().or_else(|| window.matched.borrow().clone());
                surface.filter(IsAlive::alive).map(Cow::Owned)
            }
        }
    }

    /// The object id by which an older Xwayland names the surface, while it is not matched or names another one.
    #[allow(deprecated, reason = "the successor of this method needs Xwayland 23.1")]
    pub fn unmatched_id(&self, id_of: impl Fn(&WlSurface) -> u32) -> Option<u32> {
        let Self::X11(window) = self else { return None };
        let wanted = window.x11.wl_surface_id().filter(|_| window.x11.wl_surface().is_none())?;
        let matched = window.matched.borrow().as_ref().filter(|surface| surface.alive()).map(id_of);
        (matched != Some(wanted)).then_some(wanted)
    }

    /// The surface that an older Xwayland named.
    pub fn set_matched(&self, surface: WlSurface) {
        if let Self::X11(window) = self {
            *window.matched.borrow_mut() = Some(surface);
        }
    }

    /// Whether there is something to see.
    pub fn has_content(&self) -> bool {
        let content = self
            .surface()
            .and_then(|surface| with_renderer_surface_state(&surface, |state| state.buffer().is_some()));
        content.unwrap_or(false)
    }

    /// The part of the content that is the window, without shadows.
    pub fn geometry(&self) -> Rectangle<i32, Logical> {
        match self {
            Self::Wayland(window) => window.geometry(),
            Self::X11(_) => self
                .surface()
                .map_or_else(Rectangle::zero, |surface| bbox_from_surface_tree(&surface, (0, 0))),
        }
    }

    /// The content was committed.
    pub fn on_commit(&self) {
        if let Self::Wayland(window) = self {
            window.on_commit();
        }
    }

    /// Shows it as the one in use, or not.
    pub fn set_activated(&self, active: bool) {
        match self {
            Self::Wayland(window) => {
                window.set_activated(active);
            }
            Self::X11(window) => {
                if let Err(error) = window.x11.set_activated(active) {
                    tracing::debug!(%error, "an X11 window could not be activated");
                }
            }
        }
    }

    /// What is to be drawn, front to back, with the content's origin at `at`.
    pub fn elements(&self, renderer: &mut PixmanRenderer, at: Point<i32, Physical>) -> Vec<Element> {
        let scale = Scale::from(1.0);
        match self {
            Self::Wayland(window) => window.render_elements(renderer, at, scale, 1.0),
            Self::X11(_) => self.surface().map_or_else(Vec::new, |surface| {
                render_elements_from_surface_tree(renderer, &surface, at, scale, 1.0, Kind::Unspecified)
            }),
        }
    }

    /// The surface that takes input at `point` (from the content's origin), with its place.
    pub fn surface_under(&self, point: Point<f64, Logical>) -> Option<(WlSurface, Point<i32, Logical>)> {
        match self {
            Self::Wayland(window) => window.surface_under(point, WindowSurfaceType::ALL),
            Self::X11(_) => {
                let surface = self.surface()?;
                under_from_surface_tree(&surface, point, (0, 0), WindowSurfaceType::ALL)
            }
        }
    }

    /// Sends frame callbacks.
    pub fn send_frame(&self, output: &Output, time: Duration) {
        match self {
            Self::Wayland(window) => window.send_frame(output, time, None, |_, _| Some(output.clone())),
            Self::X11(_) => {
                if let Some(surface) = self.surface() {
                    send_frames_surface_tree(&surface, output, time, None, |_, _| Some(output.clone()));
                }
            }
        }
    }

    /// Collects who wants to know when it was shown.
    pub fn take_feedback(&self, output: &Output, feedback: &mut OutputPresentationFeedback) {
        match self {
            Self::Wayland(window) => window.take_presentation_feedback(
                feedback,
                |_, _| Some(output.clone()),
                |_, _| FeedbackKind::empty(),
            ),
            Self::X11(_) => {
                if let Some(surface) = self.surface() {
                    take_presentation_feedback_surface_tree(
                        &surface,
                        feedback,
                        |_, _| Some(output.clone()),
                        |_, _| FeedbackKind::empty(),
                    );
                }
            }
        }
    }

    /// It is shown on `output`.
    pub fn enter(&self, output: &Output, overlap: Rectangle<i32, Logical>) {
        match self {
            Self::Wayland(window) => SpaceElement::output_enter(window, output, overlap),
            Self::X11(_) => {
                if let Some(surface) = self.surface() {
                    with_surfaces_surface_tree(&surface, |surface, _| output.enter(surface));
                }
            }
        }
    }

    /// It is no longer shown on `output`.
    pub fn leave(&self, output: &Output) {
        match self {
            Self::Wayland(window) => SpaceElement::output_leave(window, output),
            Self::X11(_) => {
                if let Some(surface) = self.surface() {
                    with_surfaces_surface_tree(&surface, |surface, _| output.leave(surface));
                }
            }
        }
    }
}

impl PartialEq for Window {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Wayland(window), Self::Wayland(other)) => window == other,
            (Self::X11(window), Self::X11(other)) => Rc::ptr_eq(window, other),
            _ => false,
        }
    }
}

impl IsAlive for Window {
    fn alive(&self) -> bool {
        match self {
            Self::Wayland(window) => window.alive(),
            Self::X11(window) => window.x11.alive(),
        }
    }
}
