// The page's own colours for a figure: its text and the lines marked for it, now and when the screen changes. Beside a
// narrow figure there is no room for a legend, nor for the names of phases in full size, and a finger that drags there
// is to scroll.
function dress(figure) {
  const style = getComputedStyle(document.body);
  const text = style.color, ground = style.backgroundColor;
  const narrow = window.matchMedia('(max-width: 50rem)').matches;
  const layout = {
    ...figure.layout,
    font: {...figure.layout.font, color: text},
    hoverlabel: {...figure.layout.hoverlabel, bgcolor: ground, font: {color: text}},
    legend: {...figure.layout.legend, x: narrow ? 0 : 1.02, y: narrow ? -0.16 : 1, yanchor: 'top'},
    annotations: (figure.layout.annotations || []).map(
      note => note.yref === 'paper' ? {...note, font: {...note.font, size: narrow ? 9 : 12}}
        : note.showarrow === false ? note : {...note, bgcolor: ground}),
    dragmode: narrow ? false : 'zoom',
  };
  const data = figure.data.map(
    trace => trace.meta === 'text' ? {...trace, line: {...trace.line, color: text}} : trace);
  return {...figure, data, layout};
}
function onScreenChange(call) {
  for (const query of ['(prefers-color-scheme: dark)', '(max-width: 50rem)'])
    window.matchMedia(query).addEventListener('change', call);
}
