"use strict";
// Draws the charts, and lets the page's own controls, which a keyboard reaches, choose what they show.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const drawings = read("drawings");
  const pictures = read("pictures");
  const options = {
    mode: "vega-lite",
    renderer: "svg",
    ast: true, // expressions are interpreted: the page's policy forbids code made from text
    actions: false,
    logLevel: vega.Error,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
    config: drawings.config,
  };

  const valueOf = (control) => (control.dataset.kind === "number" ? Number(control.value) : control.value);

  function choose(panel, datum) {
    let changed = false;
    for (const control of panel.querySelectorAll("[data-param]")) {
      const value = datum[control.dataset.param];
      if (value !== undefined && String(value) !== control.value) {
        control.value = value;
        changed = true;
      }
    }
    if (changed) panel.dispatchEvent(new Event("input"));
  }

  async function drawPanel(panel) {
    const controls = [...panel.querySelectorAll("[data-param]")];
    const readout = panel.querySelector(".readout");
    const sentences = drawings.readouts[panel.dataset.panel];
    const views = [];
    const update = () => {
      for (const control of controls) {
        const output = control.parentElement.querySelector("output");
        if (output) output.value = control.value;
        for (const view of views) {
          try {
            view.signal(control.dataset.param, valueOf(control));
          } catch {
            continue; // a chart without this parameter
          }
        }
      }
      for (const view of views) view.runAsync();
      if (readout) readout.textContent = sentences[controls.map((control) => control.value).join("\x1f")] ?? "Not recorded.";
    };
    for (const event of ["input", "change"]) panel.addEventListener(event, update);
    for (const place of panel.querySelectorAll("[data-chart]")) {
      const { view } = await vegaEmbed(place, drawings.charts[place.dataset.chart], options);
      view.addEventListener("click", (_, item) => item && item.datum && choose(panel, item.datum));
      views.push(view);
    }
    update();
  }

  function filterQuestions(section) {
    const form = section.querySelector("form");
    const more = section.querySelector(".more");
    const status = section.querySelector(".readout");
    const cards = [...section.querySelectorAll(".card")];
    const page = 24;
    let limit = page;
    const update = () => {
      const { model, direction, task } = Object.fromEntries(new FormData(form));
      let found = 0;
      for (const card of cards) {
        const became = JSON.parse(card.dataset.directions)[model];
        const fits = (!task || card.dataset.task === task) && (!direction || became === direction);
        if (fits) found += 1;
        card.hidden = !fits || found > limit;
        if (!card.hidden) reveal(card);
        for (const line of card.querySelectorAll("dl > div")) {
          line.classList.toggle("chosen", line.dataset.label === model);
        }
      }
      status.textContent = `${found} of ${cards.length} questions fit, ${Math.min(found, limit)} are shown.`;
      more.hidden = found <= limit;
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const event of ["input", "change"]) {
      form.addEventListener(event, () => {
        limit = page;
        update();
      });
    }
    more.addEventListener("click", () => {
      limit += page;
      update();
    });
    update();
  }

  // A picture that several questions show is in the page once.
  function reveal(card) {
    for (const image of card.querySelectorAll("img:not([src])")) image.src = pictures[image.dataset.picture];
  }

  function chooseTheme() {
    for (const radio of document.querySelectorAll("input[name=theme]")) {
      radio.addEventListener("change", () => {
        if (radio.value === "auto") delete document.documentElement.dataset.theme;
        else document.documentElement.dataset.theme = radio.value;
      });
    }
  }

  chooseTheme();
  document.querySelectorAll(".questions").forEach(filterQuestions);
  const panels = [...document.querySelectorAll("[data-panel]")].map(drawPanel);
  Promise.all(panels).then(() => (document.documentElement.dataset.drawn = "yes"));
})();
